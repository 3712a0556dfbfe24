// What the programs share: parsing, and errors that become a line on stderr and an exit code.
#pragma once
#include <fcntl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "describe.h"
#include "mesa/base/error.h"
#include "mesa/dist/control.h"
#include "mesa/train/version.h"

namespace mesa {

/// Where a standard stream is closed, the next file opened would get its number, and progress would be written into that file.
inline void open_standard_streams() {
  for (int fd = 0; fd <= 2; ++fd)
    if (::fcntl(fd, F_GETFD) < 0 && ::open("/dev/null", O_RDWR) < 0) std::_Exit(1);
}

/// `code`, or 1 if what was printed is lost, as on a full disk.
inline int after_output(const CLI::App& app, int code) {
  if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0) return code;
  std::fprintf(stderr, "%s: the output cannot be written: %s\n", app.get_name().c_str(), std::strerror(errno));
  return code == 0 ? 1 : code;
}

/// For an argument that nothing takes: what it may have meant.
inline std::string explain_extra(const CLI::App& app) {
  const std::vector<std::string> extra = app.remaining();
  const auto option = std::find_if(extra.begin(), extra.end(), [](const std::string& text) { return text.starts_with("-"); });
  if (option == extra.end()) return concat("'", extra.empty() ? "" : extra.front(), "' is one argument too many");
  const std::string name = option->substr(0, option->find('='));
  const size_t dashes = std::min(name.find_first_not_of('-'), name.size());
  std::vector<std::string> names;
  bool takes_keys = false;
  for (const CLI::Option* known : app.get_options())
    for (const std::string& known_name : known->get_lnames()) names.push_back(known_name), takes_keys |= known_name == "set";
  const std::string near = nearest(name.substr(dashes), names);
  return concat("there is no option ", name, near.empty() ? "" : "; did you mean --" + near + "?",
                near.empty() && takes_keys ? "; keys of the config are set with --set, such as --set train.epochs=3" : "");
}

/// Parses the command line and runs `body`. Exit codes: body's own; 1 failed; 2 wrong usage or config; 69 a rank did not come.
inline int run_app(CLI::App& app, int argc, char** argv, const std::function<int()>& body) {
  open_standard_streams();
  app.set_version_flag("--version", [] { return version_text(); });  // asking for the GPU now would be too early: ranks choose theirs first
  const auto show = [&](const std::string& form) {
    std::fputs(describe(app, form).c_str(), stdout);
    throw CLI::Success();
  };
  app.add_option_function<std::string>("--describe", show, "for the build")->check(CLI::IsMember(description_forms()))->group("");
  try {
    app.parse(argc, argv);
    return after_output(app, body());
  } catch (const CLI::ExtrasError&) {
    std::fprintf(stderr, "%s: %s (--help lists all)\n", app.get_name().c_str(), explain_extra(app).c_str());
    return 2;
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  } catch (const UsageError& e) {
    std::fprintf(stderr, "%s: %s\n", app.get_name().c_str(), e.what());
    return 2;
  } catch (const RankFailure& e) {
    std::fprintf(stderr, "%s: %s\n", app.get_name().c_str(), e.what());
    return e.exit_code();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s: %s\n", app.get_name().c_str(), e.what());
    return 1;
  }
}

}  // namespace mesa
