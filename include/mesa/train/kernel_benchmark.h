// The speed of single kernels on the shapes of a model: bytes a second beside a measured copy, and products a second.
#pragma once
#include <functional>

#include "mesa/train/benchmark.h"

namespace mesa {

struct KernelResult {
  std::string name;
  double bytes = 0, flops = 0;  ///< memory traffic and arithmetic of one call, by its definition; 0 where it is not what limits it
  Spread ms;                    ///< of one call
  double of_copy = 0;           ///< bytes a second as a share of those of a copy that moves as many bytes
  double of_bandwidth = 0;      ///< the same of a copy so long that its start and its end do not count
};
struct KernelReport {
  std::string device;
  double copy_bytes_per_second = 0;
  std::vector<KernelResult> kernels;
};

/// Every kernel that a training step of this config runs, and those of other losses, codes and families, each alone, on random values of
/// the config's model, batch and precision. On a GPU each on several sets of operands in turns, so that none is found in the cache.
/// `copy_bytes` is the size of each side of the longest copy that they are compared with; 0 takes one far beyond the device's caches.
KernelReport run_kernel_benchmark(const RunConfig& config, const std::function<void(const std::string&)>& progress = {},
                                  int64_t copy_bytes = 0);
std::string format_kernels(const KernelReport& report);
std::string kernels_json(const KernelReport& report);

}  // namespace mesa
