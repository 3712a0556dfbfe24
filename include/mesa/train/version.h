// What was built: for --version and bug reports.
#pragma once
#include <string>

namespace mesa {

/// Version, git commit, compiler, and the backends that this build has on this machine; several lines without a final line break.
std::string version_text();

}  // namespace mesa
