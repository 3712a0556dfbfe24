// What a program says of its command line beside --help: a man page, and scripts with which shells complete it. All are made of the table
// of options that also parses them, when Mesa is built, so that none can go stale.
#pragma once
#include <CLI/CLI.hpp>
#include <string>
#include <vector>

namespace mesa {

/// The forms: man, yaml (the man page of config files, the same of every program), bash, zsh, fish.
const std::vector<std::string>& description_forms();
/// Throws Error for another form.
std::string describe(const CLI::App& app, const std::string& form);

}  // namespace mesa
