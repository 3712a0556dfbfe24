// Ranges of groups, lo[g] = min and hi[g] = max over the finite elements of group g.
#include "codec_pass.cuh"
#include "mesa/base/cuda.h"

namespace mesa::kernels::cuda {
namespace {

__global__ void calibrate_range_kernel(int64_t groups, const float* lo, const float* hi, float* alpha, float* beta) {
  for (int64_t g = global_index(); g < groups; g += global_stride()) {
    const RangeEstimate first = calibrated_range(lo[g], hi[g]);
    alpha[g] = first.alpha, beta[g] = first.beta;
  }
}

}  // namespace

uint32_t* watch_scratch(int slot) {
  constexpr int64_t kWords = 2 * Watch::kLate + 1;
  static uint32_t* const memory = [] {
    constexpr auto kBytes = static_cast<int64_t>(kScratchSlots * kWords * sizeof(uint32_t));
    void* fresh = mesa::cuda::allocate(kBytes);  // no tensor: scratch of kernels is not metered
    if (fresh == nullptr) {
      Allocator::of(kCuda).release_cached();
      fresh = mesa::cuda::allocate(kBytes);
    }
    if (fresh == nullptr) throw OutOfMemory(concat("out of memory on cuda: ", format_bytes(kBytes), " for the ranges of activations"));
    mesa::cuda::clear(fresh, kBytes);
    return static_cast<uint32_t*>(fresh);
  }();
  return memory + slot * kWords;
}

void measure_groups(const Tensor& x, const GroupLayout& layout, const Tensor& lo, const Tensor& hi, const Tensor& counts, int step_bits) {
  const WatchedGroups groups(layout, lo, hi, counts, step_bits);
  if (x.numel() > 0)
    pass<0>("group_range", x, {layout}, groups);
  else
    groups.finish(false);
}

void group_range(const Tensor& x, GroupLayout layout, const Tensor& lo, const Tensor& hi, const Tensor& counts) {
  check_layout(x, layout);
  measure_groups(x, layout, lo, hi, counts, 0);
}

void calibrate_range(const Tensor& lo, const Tensor& hi, const Tensor& alpha, const Tensor& beta) {
  const int64_t groups = lo.numel();
  if (groups == 0) return;
  launch("calibrate_range", &calibrate_range_kernel, grid_for(groups, 256), 256, 0, groups, lo.data<float>(), hi.data<float>(),
         alpha.data<float>(), beta.data<float>());
}

}  // namespace mesa::kernels::cuda
