// AdamW: Adam with decoupled weight decay (Loshchilov and Hutter, ICLR 2019).
#pragma once
#include "mesa/kernels/kernel.h"

namespace mesa::kernels {

struct AdamWStep {
  double lr, beta1, beta2, eps, weight_decay;
  double gradient_scale;  ///< multiplies the gradient first (clipping, mean over accumulated steps)
  int64_t step;           ///< 1 for the first update: bias corrections 1 - beta^step
};

/// PyTorch's order of operations: w <- w (1 - lr decay); m, v updated; w <- w - lr / (1-beta1^t) m / (sqrt(v) / sqrt(1-beta2^t) + eps).
/// w, g, m, v f32 or f64, contiguous; `copy`, if defined, receives the new w as bf16 in the same pass.
MESA_KERNEL(adamw, const Tensor& w, const Tensor& g, const Tensor& m, const Tensor& v, const Tensor& copy, AdamWStep step);

}  // namespace mesa::kernels
