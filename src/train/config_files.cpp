// Finding config files and following `base:`.
#include <dlfcn.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "config_tree.h"
#include "mesa/train/config.h"

namespace mesa {
namespace fs = std::filesystem;

namespace {

/// Of the library, or of the program where it is linked into that.
fs::path own_file() {
  Dl_info self;
  return dladdr(reinterpret_cast<const void*>(&config_roots), &self) != 0 ? fs::path(self.dli_fname) : fs::path();
}

}  // namespace

std::vector<std::string> config_roots() {
  std::vector<std::string> roots;
  const auto add = [&](const std::string& root) {
    std::error_code ignored;
    if (!root.empty() && fs::is_directory(root, ignored) && std::find(roots.begin(), roots.end(), root) == roots.end()) roots.push_back(root);
  };
  if (const char* env = std::getenv("MESA_CONFIG_DIR")) {
    const std::string list = env;
    for (size_t from = 0; from <= list.size();) {
      const size_t colon = std::min(list.find(':', from), list.size());
      add(list.substr(from, colon - from));
      from = colon + 1;
    }
  }
  // <prefix>/bin/mesa-train, <prefix>/lib/libmesa.so or <prefix>/lib/<machine>/libmesa.so: the prefix may be moved. A program of somebody
  // else's finds the configs through the library.
  std::error_code ignored;
  add((fs::read_symlink("/proc/self/exe", ignored).parent_path().parent_path() / "share/mesa/configs").string());
  fs::path folder = fs::weakly_canonical(own_file(), ignored).parent_path();
  for (int up = 0; up < 3 && !folder.empty(); ++up, folder = folder.parent_path()) add((folder / "share/mesa/configs").string());
  return roots;
}

namespace config {
namespace {

constexpr int kMaxBases = 64;  // files in all: a diamond of bases must not grow without end

bool is_file(const fs::path& path) {
  std::error_code ignored;
  return fs::exists(path, ignored) && !fs::is_directory(path, ignored);
}

// `at` is the value that names the file, or null for a name from the command line.
std::string find_file(const std::string& name, const Value* at, const std::vector<std::string>& folders) {
  std::vector<fs::path> bases;
  if (at) bases.emplace_back(at->origin->folder);
  if (!at || !at->origin->folder.empty()) bases.emplace_back("");
  if (fs::path(name).is_relative())
    for (const std::string& root : config_roots())
      for (const std::string& folder : folders) bases.push_back(fs::path(root) / folder);
  const fs::path given(name);
  const bool complete = given.has_parent_path() || given.has_extension();  // a bare "int8" never means a stray file of that name
  std::string tried;
  for (const fs::path& base : bases)
    for (const char* suffix : {"", ".yaml"}) {
      if (name.empty() || (!complete && *suffix == 0) || (given.extension() == ".yaml" && *suffix != 0)) continue;
      const fs::path path = (base / (name + suffix)).lexically_normal();
      if (is_file(path)) return path.string();
      tried += "\n  " + path.string();
    }
  throw UsageError(concat(at ? at->where() + ": " : "", "there is no config '", name, "'; looked for", tried));
}

std::string read_text(const std::string& path) {
  std::FILE* file = std::fopen(path.c_str(), "rb");
  if (!file) throw UsageError(concat(path, ": cannot be read: ", std::strerror(errno)));
  std::string text(kMaxFileBytes + 1, '\0');  // one byte more than allowed tells "too large"
  text.resize(std::fread(text.data(), 1, text.size(), file));
  const bool failed = std::ferror(file) != 0;
  std::fclose(file);
  if (failed) throw UsageError(concat(path, ": cannot be read"));
  return text;
}

Value read_tree(const std::string& path) {
  auto origin = std::make_shared<const Origin>(Origin{path, fs::path(path).parent_path().string(), true});
  Value tree = parse_yaml(read_text(path), origin);
  if (tree.is(Value::Kind::null)) throw UsageError(concat(path, ": is empty"));
  return tree;
}

Value load_with_bases(const std::string& path, const Value* at, std::vector<std::string>& open, int& files) {
  const std::string canonical = fs::weakly_canonical(path).string();
  for (const std::string& other : open)
    if (other == canonical) refuse(*at, "base: ", path, " includes itself");
  if (++files > kMaxBases) refuse(*at, "base: more than ", kMaxBases, " files");
  Value tree = read_tree(path);
  if (!tree.is(Value::Kind::map)) refuse(tree, "a config is a mapping of keys, not ", tree.describe());
  Value* base = tree.find("base");
  if (!base) return tree;
  std::vector<Value> names = base->is(Value::Kind::list) ? base->items : std::vector<Value>{*base};
  open.push_back(canonical);
  Value result;
  result.kind = Value::Kind::map;
  result.origin = tree.origin;
  for (const Value& name : names) {
    if (!name.is(Value::Kind::scalar)) refuse(name, "base: needs the name of a file, not ", name.describe());
    merge(result, load_with_bases(find_file(name.text, &name, {"", "recipes", "models", "bench"}), &name, open, files));
  }
  open.pop_back();
  std::erase_if(tree.entries, [](const auto& entry) { return entry.key == "base"; });
  merge(result, std::move(tree));
  return result;
}

}  // namespace

Value load_tree(const std::string& name) {
  const std::string path = find_file(name, nullptr, {"", "recipes", "models", "storage", "bench"});
  std::vector<std::string> open;
  int files = 0;
  return load_with_bases(path, nullptr, open, files);
}

std::pair<std::string, Value> load_storage_tree(const std::string& name, const Value* at) {
  const std::string path = find_file(name, at, {"storage", ""});
  return {path, read_tree(path)};
}

}  // namespace config
}  // namespace mesa
