#include "mesa/train/config.h"

#include <algorithm>

#include "config_keys.h"
#include "mesa/data/augment.h"

namespace mesa {
namespace {

using config::Key;
using config::Value;

std::vector<std::string> all_names() {
  std::vector<std::string> names{"storage", "base"};
  for (const Key& key : config::keys()) names.emplace_back(key.name);
  return names;
}

std::string leaf_of(const std::string& name) { return name.substr(name.rfind('.') + 1); }
std::string section_of(const std::string& name) {
  const size_t dot = name.find('.');
  return dot == std::string::npos ? "" : name.substr(0, dot);
}

bool is_section(const std::string& name) {
  return std::any_of(config::keys().begin(), config::keys().end(), [&](const Key& key) { return section_of(key.name) == name; });
}

// The right key in the wrong place ("lr" at the top) is nearer than any spelling.
std::string suggest(const std::string& name) {
  std::vector<std::string> names = all_names(), leaves;
  const std::string leaf = leaf_of(name);
  const std::string section = section_of(name);
  for (const auto& candidate : names)
    if (leaf_of(candidate) == leaf) return candidate;
  if (is_section(section)) {
    std::vector<std::string> inside;
    for (const auto& candidate : names)
      if (section_of(candidate) == section) inside.push_back(leaf_of(candidate));
    if (const std::string near = nearest(leaf, inside); !near.empty()) return section + "." + near;
  }
  for (const auto& candidate : names)
    if (const std::string top = section_of(candidate); !top.empty()) leaves.push_back(top);
  leaves.insert(leaves.end(), names.begin(), names.end());
  return nearest(name, leaves);
}

[[noreturn]] void unknown(const std::string& name, const Value& at) {
  if (at.origin->has_lines && config::find_key(name) && name.find('.') != std::string::npos)
    config::refuse(at, "the key '", name, "' is written nested in YAML: ", section_of(name), ": {", leaf_of(name), ": ...}");
  const std::string near = suggest(name);
  config::refuse(at, "unknown key '", name, "'", near.empty() ? "" : "; did you mean '" + near + "'?");
}

void apply_leaf(const std::string& name, const Value& value, RunConfig& out) {
  const Key* key = config::find_key(name);
  if (!key) unknown(name, value);
  config::assign(*key, value, out);
  out.places[name] = value.where();
}

void apply(const Value& tree, RunConfig& out) {
  if (!tree.is(Value::Kind::map)) config::refuse(tree, "a config is a mapping of keys, not ", tree.describe());
  for (const auto& [name, value] : tree.entries) {
    if (name == "storage") {
      out.storage = config::read_storage(value);
      out.places[name] = value.where();
    } else if (name == "base") {
      config::refuse(value, "base: is allowed only at the top of a config file");
    } else if (!is_section(name)) {
      if (name.find('.') != std::string::npos) unknown(name, value);
      apply_leaf(name, value, out);
    } else if (value.is(Value::Kind::map)) {
      for (const auto& [leaf, item] : value.entries) apply_leaf(name + "." + leaf, item, out);
    } else if (!value.is(Value::Kind::null)) {  // an empty section sets nothing
      config::refuse(value, name, ": is a section of keys, not ", value.describe());
    }
  }
}

RunConfig resolve(Value tree, const std::vector<std::string>& overrides) {
  for (const auto& text : overrides) config::merge(tree, config::parse_override(text));
  RunConfig out;
  apply(tree, out);
  check_config(out);
  return out;
}

std::string rule_to_yaml(const StorageRuleConfig& rule) {
  std::string out = "{match: " + config::quote(rule.match) + ", codec: " + config::quote(rule.codec);
  for (const auto& [name, text] : rule.options) out += ", " + config::quote(name) + ": " + config::quote(text);
  return out + "}";
}

void check_pair(const RunConfig& c, const char* key, const std::vector<double>& pair) {
  if (pair.size() != 2 || !(pair[0] <= pair[1])) c.refuse(key, "needs [smallest, largest]");
}

void check_augment(const RunConfig& c) try { parse_augment(c.data.augment, "data.augment"); } catch (const Error& e) {
  throw UsageError(concat(c.where("data.augment"), ": ", e.what()));
}

void check_jitter(const RunConfig& c) {
  const std::vector<double>& jitter = c.data.color_jitter;
  if (jitter.size() != 1 && jitter.size() != 3 && jitter.size() != 4)
    c.refuse("data.color_jitter", "needs a number, [brightness, contrast, saturation], or these and the hue, not ", jitter.size(), " values");
  if (jitter.size() == 4 && jitter[3] > 0.5) c.refuse("data.color_jitter", "a hue is turned by at most 0.5, not ", jitter[3]);
}

}  // namespace

void check_config(const RunConfig& c) {
  const ModelConfig& m = c.model;
  if (m.name.empty()) c.refuse("model.name", "is empty");
  if (m.width && m.heads && *m.width % *m.heads != 0)
    c.refuse("model.width", "a width of ", *m.width, " cannot be divided among ", *m.heads, " heads");
  if (m.channels && *m.channels != 1 && *m.channels != 3) c.refuse("model.channels", "must be 1 or 3, it is ", *m.channels);
  if (m.image_size && m.patch_size && *m.image_size % *m.patch_size != 0)
    c.refuse("model.image_size", "an image of ", *m.image_size, " pixels cannot be cut into patches of ", *m.patch_size);
  check_augment(c);
  check_jitter(c);
  check_pair(c, "data.crop_scale", c.data.crop_scale);
  check_pair(c, "data.crop_ratio", c.data.crop_ratio);
  if (c.data.mean.size() != c.data.std.size())
    c.refuse("data.mean", c.data.mean.size(), " means but ", c.data.std.size(), " standard deviations (data.std)");
  if (m.channels && !c.data.mean.empty() && static_cast<int64_t>(c.data.mean.size()) != *m.channels)
    c.refuse("data.mean", c.data.mean.size(), " means for images of ", *m.channels, " channels");
  if (c.data.train_size > 0 && c.train.batch_size > c.data.train_size)
    c.refuse("train.batch_size", "a batch of ", c.train.batch_size, " is larger than the data set of ", c.data.train_size,
             " (data.train_size)");
  config::check_optimizer(c);
  if (c.lora.rank > 0 && c.lora.targets.empty()) c.refuse("lora.targets", "is empty, so that lora.rank ", c.lora.rank, " adapts nothing");
  if (!c.train.histograms.empty() && !c.train.tensorboard) c.refuse("train.histograms", "needs train.tensorboard: true");
  if (c.train.health_interval > 0 && c.train.cuda_graph)
    c.refuse("train.health_interval", "cannot look into recorded passes; set train.cuda_graph: false");
  if (c.schedule.min_lr > c.optimizer.lr) c.refuse("schedule.min_lr", c.schedule.min_lr, " is above optimizer.lr, ", c.optimizer.lr);
}

std::string RunConfig::where(const std::string& key) const {
  const auto found = places.find(key);
  return found == places.end() ? "default" : found->second;
}

RunConfig load_config(const std::string& name, const std::vector<std::string>& overrides) {
  return resolve(config::load_tree(name), overrides);
}

RunConfig parse_config(std::string_view text, const std::string& name, const std::vector<std::string>& overrides) {
  auto origin = std::make_shared<const config::Origin>(config::Origin{name, "", false});
  Value tree = config::parse_yaml(text, origin);
  if (tree.is(Value::Kind::null)) throw UsageError(concat(name, ": is empty"));
  if (tree.is(Value::Kind::map) && tree.find("base")) config::refuse(*tree.find("base"), "base: cannot be followed from a text");
  return resolve(std::move(tree), overrides);
}

std::string to_yaml(const RunConfig& config) {
  RunConfig c = config;  // the table's accessors are not const
  std::string out, section;
  for (const Key& key : config::keys()) {
    const std::string text = config::write(key, c);
    if (text.empty()) continue;
    const std::string name = key.name, top = section_of(name);
    if (top != section && !top.empty()) out += top + ":\n";
    section = top;
    out += (top.empty() ? "" : "  ") + leaf_of(name) + ": " + text + "\n";
  }
  out += "storage:\n  name: " + config::quote(c.storage.name) + "\n  rules:\n";
  for (const auto& rule : c.storage.rules) out += "    - " + rule_to_yaml(rule) + "\n";
  return out;
}

std::vector<ConfigKey> config_keys() {
  RunConfig defaults;
  std::vector<ConfigKey> out;
  for (const Key& key : config::keys()) out.push_back({key.name, config::type_name(key), config::write(key, defaults), key.doc, config::choices(key)});
  out.push_back({"storage", "name, path or list of rules", "exact",
                 "How activations wait for the backward pass: a file of configs/storage, or rules", {}});
  out.push_back({"base", "file or list of files", "", "Configs to start from, relative to this file; keys given here replace theirs", {}});
  return out;
}

std::string config_reference() {
  std::string out, section = "?";
  for (const ConfigKey& key : config_keys()) {
    const std::string top = section_of(key.name);
    if (top != section)
      out += concat(out.empty() ? "" : "\n", "### ", top.empty() ? "Top level" : top,
                    "\n\n| key | value | default | meaning |\n|---|---|---|---|\n");
    section = top;
    const std::string shown = key.default_value.empty() ? "" : "`" + key.default_value + "`";
    out += "| `" + key.name + "` | " + key.type + " | " + shown + " | " + key.doc + " |\n";
  }
  return out;
}

}  // namespace mesa
