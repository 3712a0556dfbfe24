#include "class_names.h"

#include <nlohmann/json.hpp>
#include <sstream>

#include "mesa/base/error.h"
#include "mesa/base/files.h"

namespace mesa {

std::vector<std::string> read_class_names(const std::string& path) {
  std::vector<std::string> names;
  std::istringstream lines(read_text(path, 1 << 26));
  for (std::string line; std::getline(lines, line);) {
    while (!line.empty() && static_cast<unsigned char>(line.back()) <= ' ') line.pop_back();
    if (line.empty()) continue;
    check_utf8(line, path, "write the file in UTF-8");
    names.push_back(line);
  }
  check(!names.empty(), path, ": holds no class names; write one a line, or remove the file");
  return names;
}

std::vector<std::string> numbered_classes(int64_t count) {
  std::vector<std::string> names;
  for (int64_t i = 0; i < count; ++i) names.push_back(std::to_string(i));
  return names;
}

void check_utf8(const std::string& name, const std::string& where, const char* what_to_do) try {
  nlohmann::json(name).dump();
} catch (const nlohmann::json::exception&) {
  fail("", where, ": the class name '", name, "' is not UTF-8; ", what_to_do);
}

}  // namespace mesa
