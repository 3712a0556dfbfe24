// Whether the ranks of a run find each other, and how fast they add up: before hours are spent on it.
#pragma once
#include "mesa/train/config.h"

namespace mesa {

/// Connects the ranks and prints, on rank 0, each one's host, device, threads, version and config; then the time and bandwidth of summing
/// 1 to 64 MB over all. Returns the exit code: not 0 where ranks differ in version, config or device, which rank 0 tells. Throws
/// RankFailure naming the ranks that did not come.
int check_comm(RunConfig config);

}  // namespace mesa
