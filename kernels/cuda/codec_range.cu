// Ranges of groups, lo[g] = min and hi[g] = max over the finite elements of group g, and running estimates of them:
// alpha <- decay alpha + (1 - decay) (hi - lo), beta <- decay beta + (1 - decay) lo.
#include "codec_pass.cuh"

namespace mesa::kernels::cuda {
namespace {

__global__ void update_range_kernel(int64_t groups, float* alpha, float* beta, const float* lo, const float* hi, double decay) {
  for (int64_t g = global_index(); g < groups; g += global_stride()) {
    const double keep = alpha[g] == 0 ? 0 : decay;  // a group that was constant so far calibrates again
    const double extent = static_cast<double>(hi[g]) - lo[g];
    // An extent beyond f32 would stay infinite in the average for ever.
    const double average = std::fma(keep, static_cast<double>(alpha[g]), (1 - keep) * extent);
    alpha[g] = static_cast<float>(average < double{FLT_MAX} ? average : double{FLT_MAX});
    beta[g] = static_cast<float>(std::fma(keep, static_cast<double>(beta[g]), (1 - keep) * lo[g]));
  }
}

__global__ void freeze_range_kernel(int64_t groups, const float* alpha, const float* beta, int bits, float* step, float* offset) {
  for (int64_t g = global_index(); g < groups; g += global_stride()) {
    step[g] = alpha[g] / top_code(bits);
    offset[g] = beta[g];
  }
}

}  // namespace

void measure_groups(const Tensor& x, const GroupLayout& layout, const Tensor& lo, const Tensor& hi, const Tensor& counts, int step_bits) {
  const WatchedGroups groups(x, layout, lo, hi, counts, step_bits);
  if (x.numel() > 0)
    pass<0>("group_range", x, {layout}, groups);
  else
    groups.finish(false);
}

void group_range(const Tensor& x, GroupLayout layout, const Tensor& lo, const Tensor& hi, const Tensor& counts) {
  check_layout(x, layout);
  measure_groups(x, layout, lo, hi, counts, 0);
}

void update_range(const Tensor& alpha, const Tensor& beta, const Tensor& lo, const Tensor& hi, double decay) {
  const int64_t groups = alpha.numel();
  if (groups == 0) return;
  launch("update_range", &update_range_kernel, grid_for(groups, 256), 256, 0, groups, alpha.data<float>(), beta.data<float>(),
         lo.data<float>(), hi.data<float>(), decay);
}

void freeze_range(const Tensor& alpha, const Tensor& beta, int bits, const Tensor& step, const Tensor& offset) {
  const int64_t groups = alpha.numel();
  if (groups == 0) return;
  launch("freeze_range", &freeze_range_kernel, grid_for(groups, 256), 256, 0, groups, alpha.data<float>(), beta.data<float>(), bits,
         step.data<float>(), offset.data<float>());
}

}  // namespace mesa::kernels::cuda
