// The `storage` key: a policy by name, or its rules in place.
#include <charconv>
#include <filesystem>
#include <functional>

#include "config_keys.h"

namespace mesa::config {
namespace {

bool is_number(const std::string& text, double& x) {
  const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), x);
  return code == std::errc{} && end == text.data() + text.size();
}

// The options that the built-in codecs share. Others belong to a user's codec, which judges them itself.
void check_option(const Value& at, const std::string& name, const std::string& text) {
  const auto wrong = [&](const char* needed) { refuse(at, "storage: ", name, " must be ", needed, ", not '", text, "'"); };
  double x = 0;
  if (name == "decay" && !(is_number(text, x) && x >= 0 && x < 1)) wrong("a number of at least 0 and below 1");
  if (name == "range" && text != "running" && text != "current") wrong("running or current");
  if (name == "rounding" && text != "stochastic" && text != "nearest") wrong("stochastic or nearest");
  if (name == "groups" && text != "heads" && text != "layer" && text != "channel") {
    const std::string number = text.ends_with(" channels") ? text.substr(0, text.find(' ')) : text;
    if (!(is_number(number, x) && x >= 1 && x <= 1e9 && number.find_first_not_of("0123456789") == std::string::npos))
      wrong("heads, layer, channel, 'N channels' or a number of elements");
  }
}

StorageRuleConfig read_rule(const Value& value) {
  if (!value.is(Value::Kind::map))
    refuse(value, "storage: a rule is a mapping such as {match: \"*\", codec: int8}, not ", value.describe());
  StorageRuleConfig rule;
  rule.where = value.where();
  for (const auto& [name, option] : value.entries) {
    if (!option.is(Value::Kind::scalar)) refuse(option, "storage: ", name, " needs one plain value, not ", option.describe());
    if (option.text.empty()) refuse(option, "storage: ", name, " is empty");
    if (name == "match")
      rule.match = option.text;
    else if (name == "codec")
      rule.codec = option.text;
    else {
      check_option(option, name, option.text);
      rule.options[name] = option.text;
    }
  }
  for (const auto& [name, text] : {std::pair{"match", &rule.match}, std::pair{"codec", &rule.codec}}) {
    if (!text->empty()) continue;
    std::string near;
    for (const auto& entry : value.entries)
      if (!nearest(entry.key, {name}).empty()) near = concat(" ('", entry.key, "' is not it)");
    refuse(value, "storage: a rule needs '", name, "'", near);
  }
  return rule;
}

std::vector<StorageRuleConfig> read_rules(const Value& list) {
  if (list.items.empty()) refuse(list, "storage: the list of rules is empty");
  std::vector<StorageRuleConfig> rules;
  for (const Value& item : list.items) rules.push_back(read_rule(item));
  return rules;
}

StorageConfig read_named(const Value& map, const std::string& fallback) {
  StorageConfig out{fallback, {}};
  for (const auto& [key, value] : map.entries) {
    if (key == "name" && value.is(Value::Kind::scalar) && !value.text.empty())
      out.name = value.text;
    else if (key == "rules" && value.is(Value::Kind::list))
      out.rules = read_rules(value);
    else if (key == "name" || key == "rules")
      refuse(value, "storage: ", key, " cannot be ", value.describe());
    else
      refuse(value, "storage: unknown key '", key, "'; a policy has name and rules");
  }
  if (out.rules.empty()) refuse(map, "storage: has no rules");
  return out;
}

StorageConfig from_file(const std::string& name, const Value* at) {
  const auto [path, tree] = load_storage_tree(name, at);
  const std::string stem = std::filesystem::path(path).stem().string();
  const Value* storage = &tree;
  if (tree.is(Value::Kind::map) && !tree.find("rules")) {
    storage = tree.find("storage");
    for (const auto& [key, value] : tree.entries)
      if (key != "storage") refuse(value, "unknown key '", key, "'; a storage file has one key, storage");
  }
  if (storage && storage->is(Value::Kind::list)) return {stem, read_rules(*storage)};
  if (storage && storage->is(Value::Kind::map)) return read_named(*storage, stem);
  refuse(storage ? *storage : tree, "a storage file holds a list of rules, not ", (storage ? *storage : tree).describe());
}

}  // namespace

StorageConfig read_storage(const Value& value) {
  if (value.is(Value::Kind::list)) return {"custom", read_rules(value)};
  if (value.is(Value::Kind::map)) return read_named(value, "custom");
  if (!value.is(Value::Kind::scalar) || value.text.empty()) refuse(value, "storage: needs a name, a path or a list of rules");
  if (!value.origin->may_read_files) refuse(value, "storage: the rules are needed here, not the name '", value.text, "'");
  return from_file(value.text, &value);
}

}  // namespace mesa::config

mesa::StorageConfig mesa::load_storage(const std::string& name) { return config::from_file(name, nullptr); }
