#include "config_tree.h"

#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/parser.h>

#include <map>
#include <sstream>

namespace mesa::config {

Value* Value::find(std::string_view key) {
  for (auto& [name, value] : entries)
    if (name == key) return &value;
  return nullptr;
}

std::string Value::where() const { return line > 0 && origin->has_lines ? concat(origin->name, ":", line) : origin->name; }

std::string Value::describe() const {
  switch (kind) {
    case Kind::null: return "nothing";
    case Kind::list: return "a list";
    case Kind::map: return "a mapping";
    case Kind::scalar: break;
  }
  const std::string shown = text.size() > 60 ? text.substr(0, 57) + "..." : text;
  return quoted ? concat("the quoted text \"", shown, "\"") : concat("'", shown, "'");
}

namespace {

// Builds Values from parser events. Keys of mappings arrive as ordinary scalars: a map on the stack alternates between key and value.
class TreeBuilder : public YAML::EventHandler {
 public:
  explicit TreeBuilder(std::shared_ptr<const Origin> origin) : origin_(std::move(origin)) {}

  Value take() {
    if (!root_.origin) root_.origin = origin_;
    return std::move(root_);
  }

  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}

  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override { leaf(make(mark, Value::Kind::null), anchor); }

  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor, const std::string& text) override {
    Value value = make(mark, Value::Kind::scalar);
    value.text = text;
    value.quoted = tag == "!";  // the parser's mark for quoted and block scalars; a plain one has "?"
    const bool null = !value.quoted && (text.empty() || text == "~" || text == "null");
    if (null) value.kind = Value::Kind::null;
    if (!tag.empty() && tag != "!" && tag != "?") refuse(value, "the YAML tag ", tag, " is not supported");
    leaf(std::move(value), anchor);
  }

  void OnAlias(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    const auto found = anchors_.find(anchor);
    if (found == anchors_.end()) refuse(make(mark, Value::Kind::null), "an alias inside the value that it names");
    count(found->second, make(mark, Value::Kind::null));
    Value copy = found->second;
    copy.line = mark.line + 1;
    leaf(std::move(copy), 0);
  }

  void OnSequenceStart(const YAML::Mark& mark, const std::string&, YAML::anchor_t anchor, YAML::EmitterStyle::value) override {
    open(make(mark, Value::Kind::list), anchor);
  }
  void OnSequenceEnd() override { close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string&, YAML::anchor_t anchor, YAML::EmitterStyle::value) override {
    open(make(mark, Value::Kind::map), anchor);
  }
  void OnMapEnd() override { close(); }

 private:
  struct Open {
    Value value;
    YAML::anchor_t anchor;
    bool has_key = false;
    std::string key;
    int key_line = 0;
  };

  Value make(const YAML::Mark& mark, Value::Kind kind) const {
    Value value;
    value.kind = kind;
    value.origin = origin_;
    value.line = mark.line + 1;
    return value;
  }

  void count(const Value& value, const Value& at) {
    if (++values_ > kMaxValues) refuse(at, "more than ", kMaxValues, " values (aliases expanded)");
    for (const auto& item : value.items) count(item, at);
    for (const auto& entry : value.entries) count(entry.value, at);
  }

  void open(Value value, YAML::anchor_t anchor) {
    if (stack_.size() >= kMaxDepth) refuse(value, "nested deeper than ", kMaxDepth, " levels");
    if (awaits_key()) refuse(value, "a key must be plain text, not ", value.describe());
    stack_.push_back({std::move(value), anchor, false, {}, 0});
  }

  void close() {
    Open done = std::move(stack_.back());
    stack_.pop_back();
    leaf(std::move(done.value), done.anchor);
  }

  bool awaits_key() const { return !stack_.empty() && stack_.back().value.is(Value::Kind::map) && !stack_.back().has_key; }

  void leaf(Value value, YAML::anchor_t anchor) {
    if (++values_ > kMaxValues) refuse(value, "more than ", kMaxValues, " values");
    if (anchor != 0) anchors_[anchor] = value;
    if (stack_.empty()) {
      root_ = std::move(value);
      return;
    }
    Open& parent = stack_.back();
    if (parent.value.is(Value::Kind::list)) {
      parent.value.items.push_back(std::move(value));
    } else if (!parent.has_key) {
      if (!value.is(Value::Kind::scalar)) refuse(value, "a key must be plain text, not ", value.describe());
      if (const Value* first = parent.value.find(value.text))
        refuse(value, "the key '", value.text, "' is given twice (first in line ", first->line, ")");
      parent.key = value.text;
      parent.key_line = value.line;
      parent.has_key = true;
    } else {
      value.line = parent.key_line;  // people look for the key
      parent.value.entries.push_back({std::move(parent.key), std::move(value)});
      parent.has_key = false;
    }
  }

  std::shared_ptr<const Origin> origin_;
  Value root_;
  std::vector<Open> stack_;
  std::map<YAML::anchor_t, Value> anchors_;
  size_t values_ = 0;
};

void check_size(std::string_view text, const Origin& origin) {
  if (text.size() > kMaxFileBytes) throw UsageError(concat(origin.name, ": larger than ", kMaxFileBytes, " bytes; this is not a config"));
}

}  // namespace

Value parse_yaml(std::string_view text, std::shared_ptr<const Origin> origin) {
  check_size(text, *origin);
  TreeBuilder builder(origin), rest(origin);
  try {
    std::istringstream in{std::string(text)};
    YAML::Parser parser(in);
    parser.HandleNextDocument(builder);
    if (parser.HandleNextDocument(rest)) throw UsageError(concat(origin->name, ": more than one YAML document"));
  } catch (const YAML::Exception& e) {
    const std::string place = e.mark.is_null() || !origin->has_lines ? origin->name : concat(origin->name, ":", e.mark.line + 1);
    throw UsageError(concat(place, ": not valid YAML: ", e.msg));
  } catch (const UsageError&) {
    throw;
  } catch (const std::exception& e) {  // the parser's own containers, on damaged directives
    throw UsageError(concat(origin->name, ": not valid YAML: ", e.what()));
  }
  return builder.take();
}

void merge(Value& base, Value over, int depth) {
  if (over.is(Value::Kind::null) && base.is(Value::Kind::map)) return;
  if (!base.is(Value::Kind::map) || !over.is(Value::Kind::map)) {
    base = std::move(over);
    return;
  }
  for (auto& [key, value] : over.entries) {
    Value* old = base.find(key);
    if (!old) {
      base.entries.push_back({key, std::move(value)});
    } else if (depth == 0 && key == "storage") {
      *old = std::move(value);  // a policy is one thing: rules of two policies mixed would be neither
    } else {
      merge(*old, std::move(value), depth + 1);
    }
  }
}

Value parse_override(const std::string& text) {
  auto origin = std::make_shared<const Origin>(Origin{"--set " + text, "", true, false});
  Value at;
  at.origin = origin;
  const size_t equals = text.find('=');
  if (equals == std::string::npos || equals == 0) refuse(at, "write it as key.path=value, for instance train.epochs=3");
  Value value = parse_yaml(std::string_view(text).substr(equals + 1), origin);
  if (equals + 1 == text.size()) refuse(at, "has no value (write null to unset)");
  const std::string path = text.substr(0, equals);
  for (size_t end = path.size();;) {  // wrap from the innermost component outwards
    const size_t dot = path.rfind('.', end - 1);
    const size_t begin = dot == std::string::npos ? 0 : dot + 1;
    if (begin == end) refuse(at, "the key '", path, "' has an empty component");
    Value outer;
    outer.kind = Value::Kind::map;
    outer.origin = origin;
    outer.entries.push_back({path.substr(begin, end - begin), std::move(value)});
    value = std::move(outer);
    if (dot == std::string::npos) return value;
    if (dot == 0) refuse(at, "the key '", path, "' has an empty component");
    end = dot;
  }
}

}  // namespace mesa::config
