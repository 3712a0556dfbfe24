// The table of floors in docs/architecture.md as code: an include that points up, or to a sibling, fails here.
#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "support/paths.h"

namespace {

namespace fs = std::filesystem;

/// What each floor may include from others; everything may include itself.
const std::map<std::string, std::set<std::string>>& floors() {
  static const std::map<std::string, std::set<std::string>> allowed = [] {
    std::map<std::string, std::set<std::string>> table;
    const auto floor = [&](const std::string& name, const std::set<std::string>& parents) {
      std::set<std::string> all{name};
      for (const std::string& parent : parents) all.insert(table.at(parent).begin(), table.at(parent).end());
      table[name] = all;
    };
    floor("base", {});
    floor("tensor", {"base"});
    floor("kernels", {"tensor"});
    floor("storage", {"kernels"});
    floor("data", {"tensor"});
    floor("autograd", {"storage"});
    floor("ops", {"autograd", "kernels"});
    floor("optim", {"autograd", "kernels"});
    floor("dist", {"autograd", "kernels"});
    floor("nn", {"ops"});
    floor("models", {"nn"});
    floor("train", {"models", "optim", "dist", "data"});
    floor("apps", {"train"});
    return table;
  }();
  return allowed;
}

/// The floor that a source file stands on, by its path from the root.
std::string floor_of(const fs::path& path) {
  auto part = path.begin();
  const std::string top = *part++;
  if (top == "kernels" || top == "apps") return top;
  if (top == "include") ++part;  // include/mesa/<floor>
  return part == path.end() ? "" : part->string();
}

struct Source {
  fs::path path;
  std::vector<std::string> lines;
};

const std::vector<Source>& sources() {
  static const std::vector<Source> all = [] {
    std::vector<Source> found;
    const fs::path root = mesa::testing::source_dir();
    for (const char* top : {"include", "src", "kernels", "apps", "tests"}) {
      if (!fs::exists(root / top)) continue;
      for (const auto& entry : fs::recursive_directory_iterator(root / top)) {
        const std::string kind = entry.path().extension();
        if (kind != ".h" && kind != ".cpp" && kind != ".cu" && kind != ".cuh") continue;
        Source source{fs::relative(entry.path(), root), {}};
        std::ifstream file(entry.path());
        for (std::string line; std::getline(file, line);) source.lines.push_back(line);
        found.push_back(std::move(source));
      }
    }
    return found;
  }();
  return all;
}

}  // namespace

TEST_CASE("architecture: includes point down") {
  static const std::regex include(R"re(^\s*#\s*include\s*"mesa/([a-z_]+)/)re");
  int seen = 0;
  for (const Source& source : sources()) {
    if (*source.path.begin() == "tests") continue;
    const std::string floor = floor_of(source.path);
    INFO(source.path.string());
    if (floors().count(floor) == 0) {
      FAIL_CHECK("stands on no floor of the table: '" << floor << "'");
      continue;
    }
    for (const std::string& line : source.lines) {
      std::smatch match;
      if (!std::regex_search(line, match, include)) continue;
      ++seen;
      INFO(floor << " includes: " << line);
      CHECK(floors().at(floor).count(match[1]) == 1);
    }
  }
  CHECK(seen > 100);
}

TEST_CASE("architecture: quoted includes beside mesa/ stay inside their floor") {
  static const std::regex include(R"re(^\s*#\s*include\s*"([^"]+)")re");
  for (const Source& source : sources()) {
    if (*source.path.begin() == "tests") continue;
    for (const std::string& line : source.lines) {
      std::smatch match;
      if (!std::regex_search(line, match, include) || match[1].str().starts_with("mesa/")) continue;
      INFO(source.path.string() << ": " << line);
      CHECK(match[1].str().find("..") == std::string::npos);
    }
  }
}

TEST_CASE("architecture: CUDA headers appear only where the CUDA backend stands") {
  static const std::regex include(R"re(^\s*#\s*include\s*<(cuda|cublas|cudnn|nccl|device_primitives)[^>]*>)re");
  int seen = 0;
  for (const Source& source : sources()) {
    const std::string path = source.path.string();
    if (*source.path.begin() == "tests" || path.starts_with("kernels/cuda/") || path.ends_with("_cuda.cpp") ||
        path.ends_with("nccl_plugin.cpp"))
      continue;
    for (const std::string& line : source.lines) {
      INFO(path << ": " << line);
      CHECK_FALSE(std::regex_search(line, include));
      ++seen;
    }
  }
  CHECK(seen > 1000);
}

namespace {

/// The headers that builds read once for all files (target_precompile_headers) or that these bring along, by what files use of them: a
/// build would not see that one of these is missing.
const std::map<std::string, std::string>& headers_of_names() {
  static const std::map<std::string, std::string> all = [] {
    const std::map<std::string, std::string> names = {
        {"algorithm",
         "adjacent_find all_of any_of clamp copy copy_backward copy_if copy_n count count_if equal fill fill_n find find_if for_each "
         "generate includes is_sorted lower_bound max max_element merge min min_element minmax minmax_element mismatch none_of "
         "nth_element partial_sort partition remove_if replace reverse rotate set_difference shuffle sort stable_sort swap_ranges "
         "transform unique upper_bound"},
        {"array", "array"},
        {"atomic", "atomic"},
        {"chrono", "chrono"},
        {"cmath",
         "cbrt ceil cos erf erfc exp exp2 expm1 fabs floor fma fmax fmin fmod frexp hypot isfinite isinf isnan ldexp llround log log10 "
         "log1p log2 lround nan nanf nearbyint nextafter pow rint round signbit sin sqrt tanh trunc"},
        {"filesystem", "filesystem"},
        {"fstream", "fstream ifstream ofstream"},
        {"functional", "cref function hash invoke reference_wrapper"},
        {"initializer_list", "initializer_list"},
        {"iterator", "back_inserter make_move_iterator"},
        {"limits", "numeric_limits"},
        {"map", "map multimap"},
        {"memory", "make_shared make_unique shared_ptr unique_ptr weak_ptr"},
        {"mutex", "lock_guard mutex scoped_lock unique_lock"},
        {"numeric", "accumulate gcd iota lcm"},
        {"optional", "make_optional nullopt optional"},
        {"set", "multiset set"},
        {"sstream", "istringstream ostringstream stringstream"},
        {"string", "getline stod stof stoi stol stoll stoul stoull string to_string"},
        {"string_view", "string_view"},
        {"tuple", "apply make_tuple tie tuple"},
        {"unordered_map", "unordered_map"},
        {"vector", "vector"}};
    std::map<std::string, std::string> by_name;
    for (const auto& [header, list] : names) {
      std::istringstream words(list);
      for (std::string word; words >> word;) by_name[word] = header;
    }
    return by_name;
  }();
  return all;
}

/// What a file includes in <>, itself or through the project's headers.
const std::set<std::string>& system_headers(const fs::path& path) {
  static std::map<fs::path, std::set<std::string>> known;
  if (const auto found = known.find(path); found != known.end()) return found->second;
  std::set<std::string>& all = known[path];
  const fs::path root = mesa::testing::source_dir();
  std::ifstream file(root / path);
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with("#include ")) continue;
    const std::string name = line.substr(10, line.find_first_of(">\"", 10) - 10);
    if (line[9] == '<') all.insert(name);
    for (const fs::path& folder : {path.parent_path(), fs::path("include"), fs::path("tests")})
      if (const fs::path own = (folder / name).lexically_normal(); line[9] == '"' && fs::exists(root / own)) {
        const std::set<std::string> theirs = system_headers(own);
        all.insert(theirs.begin(), theirs.end());
        break;
      }
  }
  return all;
}

}  // namespace

TEST_CASE("architecture: files include what they use, though builds read it before") {
  std::map<std::string, int> seen;
  for (const Source& source : sources())
    for (const std::string& line : source.lines)
      for (size_t at = line.find("std::"), comment = line.find("//"); at < comment; at = line.find("std::", at + 5)) {
        const size_t end = line.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_", at + 5);
        const auto header = headers_of_names().find(line.substr(at + 5, end - at - 5));
        if (header == headers_of_names().end()) continue;
        ++seen[header->second];
        INFO(source.path.string() << ": " << line);
        CHECK(system_headers(source.path).count(header->second) == 1);
      }
  CHECK(seen.size() == 23);
}

TEST_CASE("architecture: files stay readable") {
  const std::string unfinished[] = {std::string("TO") + "DO", std::string("FIX") + "ME"};
  for (const Source& source : sources()) {
    INFO(source.path.string());
    CHECK(source.lines.size() <= 500);
    for (size_t i = 0; i < source.lines.size(); ++i)
      for (const std::string& word : unfinished)
        if (source.lines[i].find(word) != std::string::npos) FAIL_CHECK("line " << i + 1 << " says " << word);
  }
}

TEST_CASE("architecture: names of test cases are such that ctest runs them") {
  int seen = 0;
  for (const Source& source : sources())
    for (const std::string& line : source.lines)
      if (line.starts_with("TEST_CASE(\"")) {
        ++seen;
        INFO(source.path.string());
        const std::string name = line.substr(11, line.find('"', 11) - 11);
        CHECK_THAT(name, !Catch::Matchers::Contains(";"));  // CMake would make two names of it, which match nothing
      }
  CHECK(seen > 300);
}
