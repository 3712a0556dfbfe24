// The YAML tree of a config file: our own small values instead of YAML::Node, so that every value knows where it was written.
#pragma once
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "mesa/base/error.h"

namespace mesa::config {

inline constexpr size_t kMaxFileBytes = 1 << 20;
inline constexpr int kMaxDepth = 16;
inline constexpr size_t kMaxValues = 20'000;  // aliases expanded; also bounds the quadratic search for duplicate keys

struct Origin {
  std::string name;    // file, or "--set key=value"
  std::string folder;  // what relative paths in it are relative to
  bool may_read_files = true;
  bool has_lines = true;
};

struct Value {
  enum class Kind { null, scalar, list, map };
  Kind kind = Kind::null;
  std::string text;     // of a scalar
  bool quoted = false;  // a quoted scalar is text, never a number
  std::vector<Value> items;
  struct Entry;
  std::vector<Entry> entries;  // in file order, keys unique
  std::shared_ptr<const Origin> origin;
  int line = 0;  // 1-based, of the key where there is one; 0 = none

  bool is(Kind k) const { return kind == k; }
  Value* find(std::string_view key);
  const Value* find(std::string_view key) const { return const_cast<Value*>(this)->find(key); }
  std::string where() const;
  /// "the text 'abc'", "a list", for messages
  std::string describe() const;
};

struct Value::Entry {
  std::string key;
  Value value;
};

template <class... Parts>
[[noreturn]] void refuse(const Value& at, const Parts&... parts) {
  throw UsageError(concat(at.where(), ": ", parts...));
}

/// Parses one YAML document. Throws UsageError for syntax errors, duplicate keys, several documents, too much depth or size.
Value parse_yaml(std::string_view text, std::shared_ptr<const Origin> origin);

/// Lays `over` on `base`: mappings merge key by key, anything else replaces. A section left empty (`train:`) changes nothing.
void merge(Value& base, Value over, int depth = 0);

/// Reads "key.path=value" into a tree of one value.
Value parse_override(const std::string& text);

// config_files.cpp
/// Reads a file and, first, what it is based on.
Value load_tree(const std::string& name);
/// The path of a storage file named by `at`'s text, and its tree.
std::pair<std::string, Value> load_storage_tree(const std::string& name, const Value* at);

}  // namespace mesa::config
