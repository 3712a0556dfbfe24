// AdamW: Adam with decoupled weight decay (Loshchilov and Hutter, ICLR 2019).
#pragma once
#include "mesa/kernels/kernel.h"

namespace mesa::kernels {

struct AdamWStep {
  double lr, beta1, beta2, eps;
  double gradient_scale;  ///< multiplies the gradient first (clipping, mean over accumulated steps)
  int64_t step;           ///< 1 for the first update: bias corrections 1 - beta^step
};

/// One parameter of an update: w, g, m, v f32 or f64, contiguous, of one size; `copy`, if defined, receives the new w as bf16.
struct AdamWSlot {
  Tensor w, g, m, v, copy;
  double weight_decay = 0;
};
inline const Tensor& leading_tensor(const AdamWSlot& slot) { return slot.w; }

/// One update of all parameters, in one pass over each (on a GPU in one kernel for all of them). PyTorch's order of operations:
/// w <- w (1 - lr decay); m, v updated; w <- w - lr / (1-beta1^t) m / (sqrt(v) / sqrt(1-beta2^t) + eps).
MESA_KERNEL(adamw, const std::vector<AdamWSlot>& slots, AdamWStep step);

}  // namespace mesa::kernels
