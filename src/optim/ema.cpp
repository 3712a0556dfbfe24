#include "mesa/optim/ema.h"

#include <algorithm>
#include <cmath>

#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/optimizer.h"

namespace mesa {

Ema::Ema(std::deque<Param>& params, const EmaConfig& config) : config_(config) {
  for (Param& param : params) {
    Slot slot{&param, {}};
    if (param.trainable)
      slot.average = Tensor::empty(param.value.shape(), param.value.dtype(), param.value.device(), MemoryKind::optimizer);
    slots_.push_back(std::move(slot));
  }
  restart();
}

void Ema::restart() {
  for (const Slot& slot : slots_)
    if (slot.average.defined()) kernels::copy(slot.param->value, slot.average);
  updates_ = 0;
}

double Ema::decay_of(int64_t update) const {
  if (update <= 1) return 0;
  return config_.warmup ? std::min(config_.decay, 1 - std::pow(static_cast<double>(update), -2.0 / 3)) : config_.decay;
}

void Ema::update() {
  ++updates_;
  std::vector<kernels::AverageSlot> slots;
  for (const Slot& slot : slots_)
    if (slot.average.defined()) slots.push_back({slot.average, slot.param->value});
  kernels::moving_average(slots, decay_of(updates_));
}

std::map<std::string, Tensor> Ema::state() const {
  std::map<std::string, Tensor> out;
  for (const Slot& slot : slots_) out[slot.param->name] = slot.average.defined() ? slot.average : slot.param->value;
  return out;
}

void Ema::load_state(const std::map<std::string, Tensor>& state, int64_t updates) {
  for (const Slot& slot : slots_) {
    if (!slot.average.defined()) continue;
    const std::string& name = slot.param->name;
    const auto found = state.find(name);
    check(found != state.end(), "the averaged weights have no ", name);
    check(found->second.shape() == slot.average.shape() && found->second.dtype() == slot.average.dtype(), "the averaged weights' ", name,
          " is ", found->second.shape(), ", not ", slot.average.shape());
    transfer(found->second, slot.average);
  }
  updates_ = updates;
}

void Ema::exchange() noexcept {
  for (Slot& slot : slots_) {
    if (!slot.average.defined()) continue;
    std::swap(slot.param->value, slot.average);
    slot.param->touch();
  }
}

}  // namespace mesa
