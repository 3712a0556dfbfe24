// What the programs share: parsing, and errors that become a line on stderr and an exit code.
#pragma once
#include <fcntl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <functional>
#include <string>

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
    return body();
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
