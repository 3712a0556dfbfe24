// The one table of config keys: it drives parsing, checking, writing and the documents.
#pragma once
#include <limits>
#include <span>
#include <variant>

#include "config_tree.h"
#include "mesa/train/config.h"

namespace mesa::config {

template <class T>
using Ref = T& (*)(RunConfig&);

using Field =
    std::variant<Ref<int64_t>, Ref<double>, Ref<bool>, Ref<std::string>, Ref<std::optional<int64_t>>, Ref<std::optional<double>>,
                 Ref<std::optional<bool>>, Ref<std::optional<std::string>>, Ref<std::optional<std::vector<int64_t>>>, Ref<std::vector<std::string>>, Ref<std::vector<double>>>;

/// What a value may be. Numbers: an interval, open ends excluded. Text: one of `choices` ("a|b"), or anything. Lists: `length`, or any.
struct Allowed {
  double low = -std::numeric_limits<double>::infinity(), high = std::numeric_limits<double>::infinity();
  bool low_open = false, high_open = false;
  const char* choices = "";
  size_t length = 0;
  bool single = false;  ///< of a list: a value alone stands for a list of it
};

struct Key {
  const char* name;
  Field field;
  Allowed allowed;
  const char* doc;
};

std::span<const Key> keys();
const Key* find_key(std::string_view name);

/// Reads the value into its field; throws UsageError when its type or range is wrong.
void assign(const Key& key, const Value& value, RunConfig& config);
/// The field as YAML, or "" if it is optional and unset.
std::string write(const Key& key, RunConfig& config);
std::string type_name(const Key& key);
/// The values of a key that has a fixed set of them; true and false are such a set.
std::vector<std::string> choices(const Key& key);
/// A scalar in YAML: plain where that is safe, else in double quotes.
std::string quote(const std::string& text);

// config_optimizer.cpp
/// Refuses keys of optimizer and schedule that are set though what was chosen has no such thing.
void check_optimizer(const RunConfig& config);

// config_storage.cpp
/// The `storage` key: a name, a list of rules, or {name, rules}.
StorageConfig read_storage(const Value& value);

}  // namespace mesa::config
