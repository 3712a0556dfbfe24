#include "mesa/optim/optimizer.h"

#include <algorithm>
#include <cmath>
#include <exception>

#include "mesa/kernels/elementwise.h"

namespace mesa {

Optimizer::Optimizer(std::deque<Param>& params, double weight_decay, std::vector<std::string> moments, OptimizerShard shard)
    : weight_decay_(weight_decay), moments_(std::move(moments)), shard_(std::move(shard)) {
  for (Param& param : params)
    if (param.trainable) slots_.push_back({&param, {0, param.value.numel()}, {}});
  check(!slots_.empty(), "nothing to train: every parameter is frozen");
  if (sharded())
    allocate_parts();
  else
    allocate_whole();
}

void Optimizer::allocate_whole() {
  for (Slot& slot : slots_)
    for (size_t i = 0; i < moments_.size(); ++i) {
      const Tensor& value = slot.param->value;
      slot.moments.push_back(Tensor::empty(value.shape(), value.dtype(), value.device(), MemoryKind::optimizer));
      clear(slot.moments.back());
    }
}

/// One tensor for each range and moment, which the slots' pieces are views of.
void Optimizer::allocate_parts() {
  const Tensor& first = slots_.front().param->grad;
  parts_.resize(moments_.size());
  for (std::vector<Tensor>& parts : parts_)
    for (const ArenaRange& range : shard_.ranges) {
      parts.push_back(Tensor::empty({range.count()}, first.dtype(), first.device(), MemoryKind::optimizer));
      clear(parts.back());
    }
  const Tensor nothing = Tensor::empty({0}, first.dtype(), first.device());
  for (Slot& slot : slots_) {
    const int64_t at = slot.param->grad.offset(), end = at + slot.param->grad.numel();
    slot.piece = {0, 0};
    slot.moments.assign(moments_.size(), nothing);
    for (size_t r = 0; r < shard_.ranges.size(); ++r) {
      const ArenaRange& range = shard_.ranges[r];
      const ArenaRange shared{std::max(at, range.begin), std::min(end, range.end)};
      if (shared.count() <= 0) continue;
      check(slot.piece.count() == 0, "two ranges of a shard hold pieces of ", slot.param->name);
      slot.piece = {shared.begin - at, shared.end - at};
      for (size_t i = 0; i < moments_.size(); ++i) slot.moments[i] = parts_[i][r].narrow(0, shared.begin - range.begin, shared.count());
    }
  }
}

double Optimizer::gradient_norm(double scale) const {
  std::vector<Tensor> gradients;
  for (const Slot& slot : slots_)
    if (slot.param->grad_written) gradients.push_back(piece_of(slot, slot.param->grad));
  if (gradients.empty()) return 0;
  const Tensor squares = Tensor::empty({1}, DType::f64, gradients.front().device());
  kernels::sum_squares(gradients, squares);
  if (shard_.add_up) shard_.add_up(squares);
  return std::sqrt(squares.to_vector<double>()[0]) * scale;
}

void Optimizer::step(double lr, double gradient_scale) {
  ++steps_;
  std::vector<kernels::UpdateSlot> slots;
  for (const Slot& slot : slots_) {
    Param& param = *slot.param;
    if (!param.grad_written) continue;  // took no part in this step
    const auto moment = [&](size_t i) { return i < slot.moments.size() ? slot.moments[i] : Tensor(); };
    const Tensor copy = sharded() ? Tensor() : param.bf16_copy();  // the rest of the values comes from other ranks
    slots.push_back({piece_of(slot, param.value), piece_of(slot, param.grad), moment(0), moment(1), copy, param.decay ? weight_decay_ : 0.0,
                     param.lr_scale});
  }
  update(slots, lr, gradient_scale, steps_);
  for (Slot& slot : slots_)
    if (slot.param->grad_written) slot.param->touch(!sharded() && slot.param->bf16_copy().defined());
}

std::map<std::string, Tensor> Optimizer::state() const {
  std::map<std::string, Tensor> out;
  std::exception_ptr error;
  for (size_t i = 0; i < parts_.size(); ++i) try {
      shard_.gather(parts_[i], [&](const Param& param, const Tensor& values) { out[param.name + "/" + moments_[i]] = values; });
    } catch (...) {  // the other ranks go on to the next moment, and so must this one
      if (!error) error = std::current_exception();
    }
  if (error) std::rethrow_exception(error);
  if (sharded()) return out;
  for (const Slot& slot : slots_)
    for (size_t i = 0; i < moments_.size(); ++i) out[slot.param->name + "/" + moments_[i]] = slot.moments[i];
  return out;
}

void Optimizer::load_state(const std::map<std::string, Tensor>& state, int64_t steps) {
  for (Slot& slot : slots_)
    for (size_t i = 0; i < moments_.size(); ++i) {
      const std::string name = slot.param->name + "/" + moments_[i];
      const Tensor &moment = slot.moments[i], &value = slot.param->value;
      const auto found = state.find(name);
      check(found != state.end(), "the optimizer state has no ", name);
      check(found->second.shape() == value.shape() && found->second.dtype() == value.dtype(), "the optimizer state's ", name, " is ",
            found->second.shape(), ", not ", value.shape());
      transfer(piece_of(slot, found->second), moment.reshape({moment.numel()}));
    }
  steps_ = steps;
}

double clipping_scale(double limit, double norm) { return limit > 0 ? std::min(1.0, limit / (norm + 1e-6)) : 1.0; }

}  // namespace mesa
