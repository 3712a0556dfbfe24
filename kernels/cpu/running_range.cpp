// Running range estimates: alpha <- decay alpha + (1 - decay) (hi - lo), beta <- decay beta + (1 - decay) lo.
#include <algorithm>
#include <limits>

#include "mesa/kernels/codec.h"

namespace mesa::kernels::MESA_ISA {

void update_range(const Tensor& alpha, const Tensor& beta, const Tensor& lo, const Tensor& hi, double decay) {
  float* a = alpha.data<float>();
  float* b = beta.data<float>();
  const float *l = lo.data<float>(), *h = hi.data<float>();
  for (int64_t g = 0; g < alpha.numel(); ++g) {
    const double keep = a[g] == 0 ? 0 : decay;  // a group that was constant so far calibrates again
    const double extent = static_cast<double>(h[g]) - l[g];
    // An extent beyond f32 would stay infinite in the average for ever.
    a[g] = static_cast<float>(std::min<double>(keep * a[g] + (1 - keep) * extent, std::numeric_limits<float>::max()));
    b[g] = static_cast<float>(keep * b[g] + (1 - keep) * l[g]);
  }
}

void freeze_range(const Tensor& alpha, const Tensor& beta, int bits, const Tensor& step, const Tensor& offset) {
  const float *a = alpha.data<float>(), *b = beta.data<float>();
  float *s = step.data<float>(), *o = offset.data<float>();
  const float levels = static_cast<float>((1 << bits) - 1);
  for (int64_t g = 0; g < alpha.numel(); ++g) {
    s[g] = a[g] / levels;
    o[g] = b[g];
  }
}

}  // namespace mesa::kernels::MESA_ISA
