// The optimizer and its learning-rate schedule.
#pragma once
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "mesa/autograd/var.h"

namespace mesa {

struct AdamWConfig {
  double lr = 1e-3, weight_decay = 0.05, beta1 = 0.9, beta2 = 0.999, eps = 1e-8;
};

/// AdamW with decoupled decay (Loshchilov and Hutter, ICLR 2019); parameters with decay = false (bias, norm, tokens, position) get none.
class AdamW {
 public:
  AdamW(std::deque<Param>& params, const AdamWConfig& config);

  /// The norm of all gradients together, each multiplied by `scale`; NaN or infinite if any gradient is.
  double gradient_norm(double scale = 1.0) const;
  /// One update at learning rate `lr` with gradients multiplied by `gradient_scale` (clipping, averaging).
  void step(double lr, double gradient_scale = 1.0);
  int64_t steps() const { return steps_; }

  /// Moments by "<parameter>/exp_avg" and "/exp_avg_sq", and the step count: for the checkpoint.
  std::map<std::string, Tensor> state() const;
  /// Throws Error naming the first tensor that is missing or has another shape.
  void load_state(const std::map<std::string, Tensor>& state, int64_t steps);

 private:
  struct Slot {
    Param* param;
    Tensor m, v;
  };
  AdamWConfig config_;
  std::vector<Slot> slots_;
  int64_t steps_ = 0;
};

/// Factor that brings a gradient of this norm down to `limit` (0: no limit), as torch.nn.utils.clip_grad_norm_ does.
double clipping_scale(double limit, double norm);

/// Linear warm-up, then cosine to min_lr or constant. A function of the step alone, so that resuming needs no state.
struct Schedule {
  enum class Kind { cosine, constant } kind = Kind::cosine;
  double lr = 1e-3, warmup_lr = 1e-6, min_lr = 1e-5;
  int64_t warmup_steps = 0, total_steps = 1;
  /// Learning rate of update `step` (0-based).
  double at(int64_t step) const;
};

}  // namespace mesa
