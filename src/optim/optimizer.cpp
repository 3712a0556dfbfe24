#include "mesa/optim/optimizer.h"

#include <cmath>

#include "mesa/kernels/elementwise.h"

namespace mesa {

Optimizer::Optimizer(std::deque<Param>& params, double weight_decay, std::vector<std::string> moments)
    : weight_decay_(weight_decay), moments_(std::move(moments)) {
  for (Param& param : params) {
    if (!param.trainable) continue;
    Slot slot{&param, {}};
    for (size_t i = 0; i < moments_.size(); ++i) {
      slot.moments.push_back(Tensor::empty(param.value.shape(), param.value.dtype(), param.value.device(), MemoryKind::optimizer));
      clear(slot.moments.back());
    }
    slots_.push_back(std::move(slot));
  }
  check(!slots_.empty(), "nothing to train: every parameter is frozen");
}

double Optimizer::gradient_norm(double scale) const {
  std::vector<Tensor> gradients;
  for (const Slot& slot : slots_)
    if (slot.param->grad_written) gradients.push_back(slot.param->grad);
  if (gradients.empty()) return 0;
  const Tensor squares = Tensor::empty({1}, DType::f64, gradients.front().device());
  kernels::sum_squares(gradients, squares);
  return std::sqrt(squares.to_vector<double>()[0]) * scale;
}

void Optimizer::step(double lr, double gradient_scale) {
  ++steps_;
  std::vector<kernels::UpdateSlot> slots;
  for (const Slot& slot : slots_) {
    Param& param = *slot.param;
    if (!param.grad_written) continue;  // took no part in this step
    const auto moment = [&](size_t i) { return i < slot.moments.size() ? slot.moments[i] : Tensor(); };
    slots.push_back({param.value, param.grad, moment(0), moment(1), param.bf16_copy(), param.decay ? weight_decay_ : 0.0, param.lr_scale});
  }
  update(slots, lr, gradient_scale, steps_);
  for (Slot& slot : slots_)
    if (slot.param->grad_written) slot.param->touch(slot.param->bf16_copy().defined());
}

std::map<std::string, Tensor> Optimizer::state() const {
  std::map<std::string, Tensor> out;
  for (const Slot& slot : slots_)
    for (size_t i = 0; i < moments_.size(); ++i) out[slot.param->name + "/" + moments_[i]] = slot.moments[i];
  return out;
}

void Optimizer::load_state(const std::map<std::string, Tensor>& state, int64_t steps) {
  for (Slot& slot : slots_)
    for (size_t i = 0; i < moments_.size(); ++i) {
      const std::string name = slot.param->name + "/" + moments_[i];
      const Tensor& moment = slot.moments[i];
      const auto found = state.find(name);
      check(found != state.end(), "the optimizer state has no ", name);
      check(found->second.shape() == moment.shape() && found->second.dtype() == moment.dtype(), "the optimizer state's ", name, " is ",
            found->second.shape(), ", not ", moment.shape());
      transfer(found->second, moment);
    }
  steps_ = steps;
}

double clipping_scale(double limit, double norm) { return limit > 0 ? std::min(1.0, limit / (norm + 1e-6)) : 1.0; }

}  // namespace mesa
