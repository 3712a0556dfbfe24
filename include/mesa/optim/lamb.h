// LAMB, for large batches.
#pragma once
#include "mesa/optim/optimizer.h"

namespace mesa {

struct LambConfig {
  double weight_decay = 0.01, beta1 = 0.9, beta2 = 0.999, eps = 1e-6;
  bool trust_clip = false;  ///< no trust ratio above 1
};

/// LAMB (You et al., ICLR 2020) as timm's Lamb: with bias correction, and without adaptation of what has no decay. timm's max_grad_norm is
/// the run's clipping.
class Lamb : public Optimizer {
 public:
  Lamb(std::deque<Param>& params, const LambConfig& config, OptimizerShard shard = {})
      : Optimizer(params, config.weight_decay, {"exp_avg", "exp_avg_sq"}, std::move(shard)), config_(config) {}
  const char* name() const override { return "lamb"; }

 private:
  void update(const std::vector<kernels::UpdateSlot>& slots, double lr, double gradient_scale, int64_t step) override {
    if (slots.empty()) return;
    const kernels::LambStep now{lr, config_.beta1, config_.beta2, config_.eps, gradient_scale, step, config_.trust_clip};
    const Tensor squares = Tensor::empty({static_cast<int64_t>(slots.size()), 2}, DType::f64, slots.front().w.device());
    kernels::lamb_moments(slots, now, squares);
    if (shard().add_up) shard().add_up(squares);
    kernels::lamb(slots, now, squares);
  }
  LambConfig config_;
};

}  // namespace mesa
