// What was built: for --version and bug reports.
#pragma once
#include <string>

namespace mesa {

/// Version, git commit, compiler, and the backends that this build has; several lines without a final line break. With `of_gpu` the last is
/// of the GPU, or says why there is none: asking takes some of its memory, and comes too early where a rank has yet to choose one.
std::string version_text(bool of_gpu = true);
/// "0.1.0", and the day of the last commit, "2026-11-28"; "" where that is unknown.
std::string version_number();
std::string version_date();

}  // namespace mesa
