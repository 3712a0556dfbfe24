#include "command_line.h"

#include <algorithm>
#include <filesystem>
#include <set>

#include "describe.h"
#include "mesa/base/error.h"
#include "mesa/models/model.h"
#include "mesa/train/config.h"

namespace mesa {
namespace {

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream in(text);
  for (std::string part; std::getline(in, part, separator);) parts.push_back(part);
  return parts;
}

/// Of the name of a value as --help shows it; a name that is not here is completed by nothing.
ValueKind kind_of(const std::string& name) {
  for (const char* file : {"FILE", "PATH", "CHECKPOINT", "TEXT"})
    if (name == file) return ValueKind::file;
  if (name == "FOLDER" || name == "RUN") return ValueKind::folder;
  if (name == "CONFIG") return ValueKind::config;
  if (name == "POLICY") return ValueKind::policy;
  return name == "KEY=VALUE" ? ValueKind::setting : ValueKind::other;
}

/// "[auto|CHECKPOINT]", "POLICY,...", "RUN ...": small letters are words to choose from.
void read_value(Option& option) {
  std::string name = option.value;
  if (name.front() == '[' && name.back() == ']') name = name.substr(1, name.size() - 2);
  for (const std::string end : {",...", " ..."})
    if (name.size() > end.size() && name.compare(name.size() - end.size(), end.size(), end) == 0) {
      name.resize(name.size() - end.size());
      option.list = option.list || end[0] == ',';
    }
  option.kind = ValueKind::other;
  for (const std::string& part : split(name, '|'))
    if (std::any_of(part.begin(), part.end(), [](unsigned char c) { return std::islower(c); }))
      option.choices.push_back(part);
    else
      option.kind = kind_of(part);
}

Option read_option(const CLI::Option& from) {
  Option option;
  for (const std::string& name : from.get_snames()) option.names.push_back("-" + name);
  for (const std::string& name : from.get_lnames()) option.names.push_back("--" + name);
  option.doc = from.get_description();
  option.default_value = from.get_default_str();
  option.required = from.get_required();
  if (from.get_items_expected_max() == 0) return option;  // a flag
  // CLI11 puts its checks behind the name: "TEXT:{auto,cpu,cuda}", "INT:INT in [1 - 9]".
  const std::string type = from.get_type_name();
  const size_t colon = std::min(type.find(':'), type.size());
  option.value = option.is_argument() && type.substr(0, colon) == "TEXT" ? from.get_name(true) : type.substr(0, colon);
  option.optional_value = from.get_items_expected_min() == 0;
  option.repeatable = from.get_items_expected_max() > 1;
  read_value(option);
  const std::string check = colon < type.size() ? type.substr(colon + 1) : "";
  if (check.size() > 1 && check.front() == '{' && check.back() == '}') {
    option.choices = split(check.substr(1, check.size() - 2), ',');
    option.kind = ValueKind::other;
    option.value.clear();
    for (const std::string& choice : option.choices) option.value += (option.value.empty() ? "" : "|") + choice;
  }
  return option;
}

/// Files of a folder of the shipped configs, by the names under which they are found.
std::vector<std::string> shipped(const std::string& folder, const std::string& prefix) {
  namespace fs = std::filesystem;
  std::set<std::string> names;
  for (const std::string& root : config_roots()) {
    std::error_code ignored;
    for (const fs::directory_entry& file : fs::directory_iterator(fs::path(root) / folder, ignored))
      if (file.path().extension() == ".yaml") names.insert(prefix + file.path().stem().string());
  }
  return {names.begin(), names.end()};
}

void append(std::vector<std::string>& to, const std::vector<std::string>& more) { to.insert(to.end(), more.begin(), more.end()); }

std::vector<std::string> settings() {
  std::vector<std::string> out;
  for (const ConfigKey& key : config_keys()) {
    if (key.name == "base") continue;  // of files alone
    std::vector<std::string> choices = key.choices;
    if (key.name == "model.name") choices = model_names();
    if (key.name == "storage") choices = words(ValueKind::policy);
    if (choices.empty()) out.push_back(key.name + "=");
    for (const std::string& choice : choices) out.push_back(concat(key.name, "=", choice));
  }
  return out;
}

}  // namespace

std::vector<Option> command_line(const CLI::App& app) {
  std::vector<Option> options;
  for (const CLI::Option* option : app.get_options({}))
    if (!option->get_group().empty()) options.push_back(read_option(*option));  // without a group: hidden
  return options;
}

std::vector<std::string> words(ValueKind kind) {
  std::vector<std::string> out;
  if (kind == ValueKind::policy) return shipped("storage", "");
  if (kind == ValueKind::setting) return settings();
  if (kind != ValueKind::config) return out;
  for (const char* folder : {"", "recipes", "models"}) append(out, shipped(folder, ""));
  append(out, shipped("bench", "bench/"));
  return out;
}

const std::vector<std::string>& description_forms() {
  static const std::vector<std::string> forms{"man", "yaml", "bash", "zsh", "fish"};
  return forms;
}

std::string describe(const CLI::App& app, const std::string& form) {
  if (form == "man") return man_page(app);
  if (form == "yaml") return config_man_page();
  if (form == "bash") return bash_completion(app);
  if (form == "zsh") return zsh_completion(app);
  check(form == "fish", "there is no description '", form, "'");
  return fish_completion(app);
}

}  // namespace mesa
