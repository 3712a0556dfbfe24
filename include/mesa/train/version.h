// What was built: for --version and bug reports.
#pragma once
#include <string>

namespace mesa {

/// Version, git commit, compiler, and the backends that this build has on this machine; several lines without a final line break.
std::string version_text();
/// "0.1.0", and the day of the last commit, "2026-11-28"; "" where that is unknown.
std::string version_number();
std::string version_date();

}  // namespace mesa
