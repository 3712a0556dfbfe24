// A program's options as man pages and shells need them.
#pragma once
#include <CLI/CLI.hpp>
#include <string>
#include <vector>

namespace mesa {

/// What stands behind an option, and so what a shell offers.
enum class ValueKind { none, other, file, folder, config, policy, setting };

struct Option {
  std::vector<std::string> names;    ///< "-o", "--output"; none: an argument by its place
  std::string value;                 ///< as --help shows it, "FILE"; empty: a flag
  ValueKind kind = ValueKind::none;  ///< by the name of the value: FILE, FOLDER, CONFIG, POLICY, KEY=VALUE, ...
  std::vector<std::string> choices;  ///< words that may stand there, perhaps beside others
  std::string doc, default_value;
  bool optional_value = false, repeatable = false, required = false;
  bool list = false;  ///< values separated by commas

  bool is_flag() const { return value.empty(); }
  bool is_argument() const { return names.empty(); }
};

/// All that --help shows, in its order.
std::vector<Option> command_line(const CLI::App& app);

/// What a shell offers for values of this kind besides files: names of shipped configs or policies, or all `key=` and `key=choice`.
std::vector<std::string> words(ValueKind kind);

// man_page.cpp
std::string man_page(const CLI::App& app);
std::string config_man_page();
// completion.cpp
std::string bash_completion(const CLI::App& app);
std::string zsh_completion(const CLI::App& app);
std::string fish_completion(const CLI::App& app);

}  // namespace mesa
