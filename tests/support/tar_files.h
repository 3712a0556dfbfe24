// Tar archives for tests, header by header, so that each part can be wrong.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "support/data_files.h"

namespace mesa::testing {

/// One entry: a ustar header with a right checksum, the content, and its padding.
Bytes tar_entry(const std::string& name, const Bytes& content, char type = '0');
/// The same with the octal text of the size given.
Bytes tar_entry_of_size(const std::string& name, const Bytes& content, const std::string& size, char type = '0');
/// Corrects the checksum of the header at `at` after a change.
void fix_checksum(Bytes& tar, size_t at);
/// Two blocks of zeros.
Bytes tar_end();
Bytes text_bytes(const std::string& text);
Bytes joined(const std::vector<Bytes>& parts);

using NamedFiles = std::vector<std::pair<std::string, Bytes>>;
/// A whole archive.
Bytes tar_bytes(const NamedFiles& files);

}  // namespace mesa::testing
