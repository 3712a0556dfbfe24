// AdamW.
#pragma once
#include "mesa/optim/optimizer.h"

namespace mesa {

struct AdamWConfig {
  double lr = 1e-3, weight_decay = 0.05, beta1 = 0.9, beta2 = 0.999, eps = 1e-8;
};

/// AdamW with decoupled decay (Loshchilov and Hutter, ICLR 2019), torch.optim.AdamW.
class AdamW : public Optimizer {
 public:
  AdamW(std::deque<Param>& params, const AdamWConfig& config, OptimizerShard shard = {})
      : Optimizer(params, config.weight_decay, {"exp_avg", "exp_avg_sq"}, std::move(shard)), config_(config) {}
  const char* name() const override { return "adamw"; }

 private:
  void update(const std::vector<kernels::UpdateSlot>& slots, double lr, double gradient_scale, int64_t step) override {
    kernels::adamw(slots, kernels::AdamWStep{lr, config_.beta1, config_.beta2, config_.eps, gradient_scale, step});
  }
  AdamWConfig config_;
};

}  // namespace mesa
