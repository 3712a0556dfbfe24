#include "support/html.h"

#include <cctype>
#include <set>
#include <stdexcept>

namespace mesa::testing {
namespace {

class Walker {
 public:
  explicit Walker(const std::string& html) : html_(html) {}

  std::vector<Element> operator()() {
    expect("<!DOCTYPE html>");
    while (at_ < html_.size()) {
      if (html_[at_] != '<') {
        text();
      } else if (html_.compare(at_, 2, "</") == 0) {
        close();
      } else {
        open();
      }
    }
    if (!stack_.empty()) fail("<" + elements_[stack_.back()].name + "> is not closed");
    return elements_;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(what + ", at byte " + std::to_string(at_) + ": " + html_.substr(at_ > 30 ? at_ - 30 : 0, 90));
  }
  void expect(const std::string& token) {
    if (html_.compare(at_, token.size(), token) != 0) fail("'" + token + "' is missing");
    at_ += token.size();
  }
  std::string name() {
    const size_t from = at_;
    while (at_ < html_.size() && (std::isalnum(static_cast<unsigned char>(html_[at_])) || html_[at_] == '-')) ++at_;
    if (at_ == from) fail("a name is missing");
    return html_.substr(from, at_ - from);
  }
  void spaces() {
    while (at_ < html_.size() && std::isspace(static_cast<unsigned char>(html_[at_]))) ++at_;
  }
  /// Up to the character `end`, entities decoded.
  std::string decoded(char end) {
    std::string out;
    while (at_ < html_.size() && html_[at_] != end) {
      if (html_[at_] == '<') fail("'<' stands bare");
      if (html_[at_] != '&') {
        out += html_[at_++];
        continue;
      }
      expect("&#");
      const size_t semicolon = html_.find(';', at_);
      if (semicolon == std::string::npos || semicolon - at_ > 6) fail("an entity does not end");
      out += static_cast<char>(std::stoi(html_.substr(at_, semicolon - at_)));
      at_ = semicolon + 1;
    }
    return out;
  }
  void text() {
    const std::string found = decoded('<');
    if (!stack_.empty()) {
      elements_[stack_.back()].text += found;
    } else if (found.find_first_not_of(" \n") != std::string::npos) {
      fail("text stands outside of every element");
    }
  }
  void open() {
    ++at_;
    Element element{name(), {}, ""};
    for (spaces(); at_ < html_.size() && html_[at_] != '>' && html_[at_] != '/'; spaces()) {
      const std::string key = name();
      expect("=\"");
      if (!element.attributes.emplace(key, decoded('"')).second) fail("the attribute " + key + " comes twice");
      expect("\"");
    }
    const auto id = element.attributes.find("id");
    if (id != element.attributes.end() && !ids_.insert(id->second).second) fail("the id " + id->second + " comes twice");
    elements_.push_back(element);
    if (html_[at_] == '/') return expect("/>");
    expect(">");
    stack_.push_back(elements_.size() - 1);
    if (element.name != "script" && element.name != "style") return;
    const size_t end = html_.find("</" + element.name, at_);
    if (end == std::string::npos) fail("<" + element.name + "> is not closed");
    elements_.back().text = html_.substr(at_, end - at_);
    at_ = end;
  }
  void close() {
    expect("</");
    const std::string found = name();
    expect(">");
    if (stack_.empty() || elements_[stack_.back()].name != found) fail("</" + found + "> closes nothing");
    stack_.pop_back();
  }

  const std::string& html_;
  size_t at_ = 0;
  std::vector<Element> elements_;
  std::vector<size_t> stack_;
  std::set<std::string> ids_;
};

}  // namespace

std::vector<Element> walk_html(const std::string& html) { return Walker(html)(); }

}  // namespace mesa::testing
