// Updates of all parameters of a model, AdamW, SGD and LAMB, and the moving average of their values.
#pragma once
#include "mesa/kernels/kernel.h"

namespace mesa::kernels {

/// One parameter of an update: w, g, m, v f32 or f64, contiguous, of one size; `copy`, if defined, receives the new w as bf16.
struct UpdateSlot {
  Tensor w, g;
  Tensor m, v;  ///< moments; undefined where the optimizer has none
  Tensor copy;
  double weight_decay = 0;
  double lr_scale = 1;  ///< this parameter's share of the learning rate
};
inline const Tensor& leading_tensor(const UpdateSlot& slot) { return slot.w; }

struct AdamWStep {
  double lr, beta1, beta2, eps;
  double gradient_scale;  ///< multiplies the gradient first (clipping, mean over accumulated steps)
  int64_t step;           ///< 1 for the first update: bias corrections 1 - beta^step
};

/// AdamW: Adam with decoupled weight decay (Loshchilov and Hutter, ICLR 2019). One pass over each parameter (on a GPU one kernel for all of
/// them), in PyTorch's order of operations, with lr the parameter's own (lr lr_scale):
/// w <- w (1 - lr decay); m, v updated; w <- w - lr / (1-beta1^t) m / (sqrt(v) / sqrt(1-beta2^t) + eps).
MESA_KERNEL(adamw, const std::vector<UpdateSlot>& slots, AdamWStep step);

struct SgdStep {
  double lr, momentum;
  bool nesterov;
  double gradient_scale;
};

/// SGD as torch.optim.SGD without dampening (Sutskever et al., ICML 2013), in one pass: d = g + decay w; with momentum > 0 (which needs m)
/// m <- momentum m + d and d = m, or d + momentum m (nesterov); w <- w - lr d.
MESA_KERNEL(sgd, const std::vector<UpdateSlot>& slots, SgdStep step);

struct LambStep {
  double lr, beta1, beta2, eps, gradient_scale;
  int64_t step;     ///< as in AdamWStep
  bool trust_clip;  ///< no ratio above 1 (timm's lambc)
};

/// LAMB (You et al., ICLR 2020) as timm's Lamb with always_adapt = false: m, v as in AdamW;
/// u = m / (1-beta1^t) / (sqrt(v) / sqrt(1-beta2^t) + eps) + decay w; w <- w - lr r u with the trust ratio r = |w| / |u|, norms of the
/// whole parameter in double, in a fixed order; r = 1 where a norm is 0 or decay is. Two passes, between which `squares` [slots, 2] f64 may
/// be added up where slots are pieces of parameters: the first updates m and v and leaves the sums of w^2 and u^2 of each slot there, the
/// second updates w by them. Slots may be empty.
MESA_KERNEL(lamb_moments, const std::vector<UpdateSlot>& slots, LambStep step, const Tensor& squares);
MESA_KERNEL(lamb, const std::vector<UpdateSlot>& slots, LambStep step, const Tensor& squares);

/// f32 or f64, contiguous, of one size.
struct AverageSlot {
  Tensor average, value;
};
inline const Tensor& leading_tensor(const AverageSlot& slot) { return slot.average; }

/// average <- decay average + (1 - decay) value, computed as torch.lerp does: for decay 0 exactly the value.
MESA_KERNEL(moving_average, const std::vector<AverageSlot>& slots, double decay);

}  // namespace mesa::kernels
