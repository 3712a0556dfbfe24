// Whether the ranks of a run find each other, and how fast they add up: before hours are spent on it.
#pragma once
#include "mesa/train/config.h"

namespace mesa {

/// Connects the ranks and prints, on rank 0, each one's host, device, threads, version and config; then the time and bandwidth of summing
/// 1 to 64 MB over all. Throws Error naming the ranks that did not come, or that differ in version or config. Returns the exit code.
int check_comm(RunConfig config);

}  // namespace mesa
