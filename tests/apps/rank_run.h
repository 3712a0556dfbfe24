// Tiny runs on several ranks of this machine.
#pragma once
#include <cstring>

#include "apps/tiny_run.h"
#include "support/mpirun.h"

namespace mesa::testing {

inline Args with(Args args, const Args& more) {
  args.insert(args.end(), more.begin(), more.end());
  return args;
}
inline std::string batch_of(int ranks) { return mesa::concat("train.batch_size=", 16 / ranks); }

struct RankRun : TinyRun {
  ProcessResult train_on(int ranks, const Args& sets, const std::string& output, const Args& more = {}) const {
    return mpirun(ranks, "mesa-train", train_args(with(sets, {batch_of(ranks)}), output, more), {}, path("."));
  }
  /// `timeout`: MESA_RANK_TIMEOUT, seconds.
  std::unique_ptr<Process> start_on(int ranks, const Args& sets, const std::string& output, const Args& more = {}, int timeout = 8) const {
    Args args{"mpirun"};
    for (std::string& arg : mpirun_args(ranks)) args.push_back(std::move(arg));
    args.push_back(std::string(MESA_BIN_DIR) + "/mesa-train");
    for (std::string& arg : train_args(with(sets, {batch_of(ranks)}), output, more)) args.push_back(std::move(arg));
    const Environment environment = mpirun_environment({{"MESA_RANK_TIMEOUT", std::to_string(timeout)}});
    return std::make_unique<Process>("/usr/bin/env", args, environment, path("."));
  }
  std::string weights(const std::string& run) const {
    const std::string text = read_text(path(run + "/checkpoints/last/model.safetensors"));
    uint64_t header = 0;
    std::memcpy(&header, text.data(), 8);
    return text.substr(8 + header);  // the metadata before it hold the config
  }
};

}  // namespace mesa::testing
