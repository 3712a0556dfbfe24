#include "support/mpirun.h"

#include <catch2/catch.hpp>

#include "support/data_files.h"

namespace mesa::testing {

namespace fs = std::filesystem;

bool has_mpirun() {
  const fs::path plugin = fs::path(MESA_BIN_DIR).parent_path() / "libmesa_mpi.so";
  std::istringstream path(std::getenv("PATH") != nullptr ? std::getenv("PATH") : "");
  std::error_code none;  // a folder that may not be read
  bool found = false;
  for (std::string folder; std::getline(path, folder, ':');) found = found || fs::exists(fs::path(folder) / "mpirun", none);
  if (found && fs::exists(plugin)) return true;
  WARN("skipped: " << (found ? "this build has no MPI" : "there is no mpirun"));
  return false;
}

std::vector<std::string> mpirun_args(int ranks) { return {"--oversubscribe", "--bind-to", "none", "-n", std::to_string(ranks)}; }

Environment mpirun_environment(Environment env) {
  // Each mpirun makes and removes folders of its own in a common one, where those of two that begin and end at once get into each other's
  // way.
  static const TemporaryFolder sessions;
  static int count = 0;
  const fs::path session = sessions.path() / std::to_string(count++);
  fs::create_directory(session);
  env.insert({"OMPI_MCA_orte_tmpdir_base", session.string()});
  env.insert({{"OMPI_ALLOW_RUN_AS_ROOT", "1"}, {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"}});
  env.insert({"OMPI_MCA_btl_vader_single_copy_mechanism", "none"});  // containers may forbid to read another process, and it notices late
  const char* sanitizer = std::getenv("ASAN_OPTIONS");
  if (sanitizer != nullptr) env["ASAN_OPTIONS"] = std::string(sanitizer) + ":detect_leaks=0";  // Open MPI leaks at its end
  return env;
}

ProcessResult mpirun(int ranks, const std::string& program, const std::vector<std::string>& args, Environment env,
                     const std::string& folder) {
  std::vector<std::string> all{"mpirun"};
  for (std::string& arg : mpirun_args(ranks)) all.push_back(std::move(arg));
  all.push_back((fs::path(MESA_BIN_DIR) / program).string());
  all.insert(all.end(), args.begin(), args.end());
  return run("/usr/bin/env", all, mpirun_environment(std::move(env)), folder);
}

}  // namespace mesa::testing
