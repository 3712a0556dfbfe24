// Codes by running estimates of ranges: alpha <- decay alpha + (1 - decay) (hi - lo), beta <- decay beta + (1 - decay) lo.
#include "mesa/kernels/codec_common.h"
#include "mesa/kernels/codec_scalar.h"

namespace mesa::kernels::MESA_ISA {

void quantize_running(const Tensor& x, const Coding& into) {
  check_layout(x, into.layout);
  const Tensor lo = empty_like(into.step), hi = empty_like(into.step);
  float *step = per_group(into.step, into.layout), *offset = per_group(into.offset, into.layout);
  const float *alpha = per_group(into.alpha, into.layout), *beta = per_group(into.beta, into.layout);
  for (int64_t g = 0; g < into.layout.groups; ++g) step[g] = alpha[g] / top_code(into.bits), offset[g] = beta[g];
  quantize(x, into.layout, into.bits, into.stochastic, into.key, into.step, into.offset, into.codes, lo, hi, into.counts);
  float *next_alpha = per_group(into.next_alpha, into.layout), *next_beta = per_group(into.next_beta, into.layout);
  for (int64_t g = 0; g < into.layout.groups; ++g) {
    const RangeEstimate next = averaged_range({alpha[g], beta[g]}, lo.data<float>()[g], hi.data<float>()[g], into.decay);
    next_alpha[g] = next.alpha, next_beta[g] = next.beta;
  }
}

void calibrate_range(const Tensor& lo, const Tensor& hi, const Tensor& alpha, const Tensor& beta) {
  for (int64_t g = 0; g < lo.numel(); ++g) {
    const RangeEstimate first = calibrated_range(lo.data<float>()[g], hi.data<float>()[g]);
    alpha.data<float>()[g] = first.alpha, beta.data<float>()[g] = first.beta;
  }
}

}  // namespace mesa::kernels::MESA_ISA
