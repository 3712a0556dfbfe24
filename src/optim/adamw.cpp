#include "mesa/optim/adamw.h"

#include <cmath>
#include <numbers>

#include "mesa/kernels/adamw.h"
#include "mesa/kernels/elementwise.h"

namespace mesa {

AdamW::AdamW(std::deque<Param>& params, const AdamWConfig& config) : config_(config) {
  for (Param& param : params) {
    if (!param.trainable) continue;
    Slot slot{&param, {}, {}};
    for (Tensor* moment : {&slot.m, &slot.v}) {
      *moment = Tensor::empty(param.value.shape(), param.value.dtype(), param.value.device(), MemoryKind::optimizer);
      clear(*moment);
    }
    slots_.push_back(std::move(slot));
  }
  check(!slots_.empty(), "nothing to train: every parameter is frozen");
}

double AdamW::gradient_norm(double scale) const {
  std::vector<Tensor> gradients;
  for (const Slot& slot : slots_)
    if (slot.param->grad_written) gradients.push_back(slot.param->grad);
  if (gradients.empty()) return 0;
  const Tensor squares = Tensor::empty({1}, DType::f64, gradients.front().device());
  kernels::sum_squares(gradients, squares);
  return std::sqrt(squares.to_vector<double>()[0]) * scale;
}

void AdamW::step(double lr, double gradient_scale) {
  ++steps_;
  std::vector<kernels::AdamWSlot> slots;
  for (Slot& slot : slots_) {
    Param& param = *slot.param;
    if (!param.grad_written) continue;  // took no part in this step
    slots.push_back({param.value, param.grad, slot.m, slot.v, param.bf16_copy(), param.decay ? config_.weight_decay : 0.0});
  }
  kernels::adamw(slots, kernels::AdamWStep{lr, config_.beta1, config_.beta2, config_.eps, gradient_scale, steps_});
  for (Slot& slot : slots_)
    if (slot.param->grad_written) slot.param->touch(slot.param->bf16_copy().defined());
}

std::map<std::string, Tensor> AdamW::state() const {
  std::map<std::string, Tensor> out;
  for (const Slot& slot : slots_) {
    out[slot.param->name + "/exp_avg"] = slot.m;
    out[slot.param->name + "/exp_avg_sq"] = slot.v;
  }
  return out;
}

void AdamW::load_state(const std::map<std::string, Tensor>& state, int64_t steps) {
  for (Slot& slot : slots_)
    for (const auto& [suffix, moment] : {std::pair{"/exp_avg", slot.m}, std::pair{"/exp_avg_sq", slot.v}}) {
      const auto found = state.find(slot.param->name + suffix);
      check(found != state.end(), "the optimizer state has no ", slot.param->name, suffix);
      check(found->second.shape() == moment.shape() && found->second.dtype() == moment.dtype(), "the optimizer state's ", slot.param->name, suffix,
            " is ", found->second.shape(), ", not ", moment.shape());
      transfer(found->second, moment);
    }
  steps_ = steps;
}

double clipping_scale(double limit, double norm) { return limit > 0 ? std::min(1.0, limit / (norm + 1e-6)) : 1.0; }

double Schedule::at(int64_t step) const {
  if (step < warmup_steps) return warmup_lr + (lr - warmup_lr) * static_cast<double>(step) / static_cast<double>(warmup_steps);
  if (kind == Kind::constant || total_steps <= warmup_steps) return lr;
  const double done = std::min(1.0, static_cast<double>(step - warmup_steps) / static_cast<double>(total_steps - warmup_steps));
  return min_lr + (lr - min_lr) * 0.5 * (1 + std::cos(std::numbers::pi * done));
}

}  // namespace mesa
