// Reading whole files of outside data.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace mesa {

/// All bytes of a regular file; the error says whether it is missing, not a file, unreadable or larger than `limit` bytes, which is found
/// out before memory is taken.
std::vector<uint8_t> read_bytes(const std::string& path, int64_t limit = int64_t{1} << 34);
/// The same as text.
std::string read_text(const std::string& path, int64_t limit = int64_t{1} << 34);

}  // namespace mesa
