// The tiny run on several ranks.
#pragma once
#include <algorithm>
#include <cctype>
#include <cstring>
#include <map>
#include <memory>

#include "apps/tiny_run.h"
#include "support/mpirun.h"

namespace mesa::testing {

inline Args with(Args args, const Args& more) {
  args.insert(args.end(), more.begin(), more.end());
  return args;
}

struct RankRun : TinyRun {
  int batch = 16;   ///< images that the weights see at once, whatever the number of ranks
  int timeout = 8;  ///< MESA_RANK_TIMEOUT of runs that are started, seconds

  std::string batch_of(int ranks) const { return mesa::concat("train.batch_size=", batch / ranks); }
  ProcessResult train_on(int ranks, const Args& sets, const std::string& output, const Args& more = {}) const {
    return mpirun(ranks, "mesa-train", train_args(with(sets, {batch_of(ranks)}), output, more), {}, path("."));
  }
  /// With MPI's own `options`.
  std::unique_ptr<Process> start_on(int ranks, const Args& sets, const std::string& output, const Args& more = {},
                                    const Args& options = {}) const {
    Args args = with(with({"mpirun"}, mpirun_args(ranks)), options);
    args.push_back(std::string(MESA_BIN_DIR) + "/mesa-train");
    return launch(with(std::move(args), train_args(with(sets, {batch_of(ranks)}), output, more)));
  }
  /// Each rank is a shell that runs `command`; $BIN is where the programs are, $OMPI_COMM_WORLD_RANK which rank it is.
  std::unique_ptr<Process> start_shells(int ranks, const std::string& command, const Args& options = {}) const {
    return launch(with(with(with({"mpirun"}, mpirun_args(ranks)), options), {"/bin/bash", "-c", "BIN=" MESA_BIN_DIR "; " + command}));
  }
  std::string weights(const std::string& run) const {
    const std::string text = read_text(path(run + "/checkpoints/last/model.safetensors"));
    uint64_t header = 0;
    std::memcpy(&header, text.data(), 8);
    return text.substr(8 + header);  // the metadata before it hold the config
  }

 private:
  std::unique_ptr<Process> launch(const Args& args) const {
    return std::make_unique<Process>("/usr/bin/env", args, mpirun_environment({{"MESA_RANK_TIMEOUT", std::to_string(timeout)}}), path("."));
  }
};

/// The processes of the run that writes to `output`, by rank; empty until all have begun.
inline std::vector<pid_t> ranks_of(const std::string& output) {
  std::map<int, pid_t> found;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    const std::string name = entry.path().filename();
    if (!std::all_of(name.begin(), name.end(), [](unsigned char c) { return std::isdigit(c) != 0; })) continue;
    const auto read = [&](const char* file) {
      std::ostringstream text;  // which stays empty where the process has just gone
      text << std::ifstream(entry.path() / file, std::ios::binary).rdbuf();
      return text.str();
    };
    const std::string line = read("cmdline");
    if (line.find("mesa-train") >= line.find('\0') || line.find(output + '\0') == std::string::npos) continue;
    const std::string environment = read("environ"), key = std::string(1, '\0') + "OMPI_COMM_WORLD_RANK=";
    const size_t place = environment.find(key);
    if (place != std::string::npos) found[std::atoi(environment.c_str() + place + key.size())] = std::stoi(name);
  }
  std::vector<pid_t> pids;
  for (const auto& [rank, pid] : found) pids.push_back(pid);
  return pids;
}

}  // namespace mesa::testing
