// Names of classes, as several formats have them.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace mesa {

/// The names in a file, one a line. Throws Error naming the file for names that are not UTF-8, and for none.
std::vector<std::string> read_class_names(const std::string& path);
/// "0", "1", ...: what classes without names are called.
std::vector<std::string> numbered_classes(int64_t count);
/// Checkpoints and results keep the class names as JSON: better an error now than after the first epoch.
void check_utf8(const std::string& name, const std::string& where, const char* what_to_do);

}  // namespace mesa
