// Programs of the build as ranks of one MPI run on this machine.
#pragma once
#include <cstdlib>
#include <filesystem>
#include <sstream>

#include "support/process.h"

namespace mesa::testing {

/// False, with a warning in the test's output, where there is no mpirun or this build has no plugin for it.
bool has_mpirun();

/// mpirun's arguments before the program: as many ranks as asked for, whatever the machine has, also as root.
std::vector<std::string> mpirun_args(int ranks);
Environment mpirun_environment(Environment more = {});
/// `program` of the build as `ranks` ranks.
ProcessResult mpirun(int ranks, const std::string& program, const std::vector<std::string>& args, Environment env = {},
                     const std::string& folder = ".");

}  // namespace mesa::testing
