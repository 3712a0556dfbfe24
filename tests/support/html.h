// A strict walk over a report's HTML, which is also XML but for its doctype: tags that close, quoted attributes, known entities.
#pragma once
#include <map>
#include <string>
#include <vector>

namespace mesa::testing {

struct Element {
  std::string name;
  std::map<std::string, std::string> attributes;
  std::string text;  ///< directly within, entities decoded
};

/// Throws std::runtime_error saying what is not well formed and where. Elements in the order of their start.
std::vector<Element> walk_html(const std::string& html);

}  // namespace mesa::testing
