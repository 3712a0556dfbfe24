// Stochastic gradient descent with momentum.
#pragma once
#include "mesa/optim/optimizer.h"

namespace mesa {

struct SgdConfig {
  double weight_decay = 0, momentum = 0.9;
  bool nesterov = false;
};

/// torch.optim.SGD without dampening: decay is coupled (added to the gradient), and the momentum buffer begins as the first gradient.
/// Without momentum nothing is remembered.
class Sgd : public Optimizer {
 public:
  Sgd(std::deque<Param>& params, const SgdConfig& config, OptimizerShard shard = {})
      : Optimizer(params, config.weight_decay,
                  config.momentum > 0 ? std::vector<std::string>{"momentum_buffer"} : std::vector<std::string>{}, std::move(shard)),
        config_(config) {}
  const char* name() const override { return "sgd"; }

 private:
  void update(const std::vector<kernels::UpdateSlot>& slots, double lr, double gradient_scale, int64_t) override {
    kernels::sgd(slots, kernels::SgdStep{lr, config_.momentum, config_.nesterov, gradient_scale});
  }
  SgdConfig config_;
};

}  // namespace mesa
