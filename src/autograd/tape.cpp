#include "mesa/autograd/tape.h"

#include <atomic>
#include <utility>

#include "mesa/base/scope.h"
#include "mesa/kernels/elementwise.h"

namespace mesa {
namespace {
thread_local Tape* current_tape = nullptr;
std::atomic<uint64_t> next_tape_id{1};

/// For ops that return the gradient of an input instead of writing through a Target.
void add_to_parameter(Param& param, const Tensor& gradient) {
  if (!param.grad.defined())
    param.grad = Tensor::empty(param.value.shape(), param.value.dtype(), param.value.device(), MemoryKind::gradients);
  if (param.grad_written)
    kernels::add(param.grad, gradient, param.grad);
  else
    kernels::copy(gradient, param.grad);
  param.grad_written = true;
}
}  // namespace

Tape::Tape(StoragePolicy& policy, uint64_t seed, uint64_t step, const uint64_t* live_step, uint64_t part)
    : policy_(policy), id_(next_tape_id++), seed_(seed), step_(step), part_(part), live_step_(live_step), previous_(current_tape) {
  policy_.begin(part == 0 ? seed : mix64(seed ^ mix64(part)), step, live_step);  // no two ranks round alike
  current_tape = this;
}

RandomKey Tape::random(const std::string& stream, int64_t elements, int64_t at_once) const {
  RandomKey key = RandomKey::of(seed_, stream, step_, live_step_);
  if (elements % at_once == 0)
    key.first = part_ * static_cast<uint64_t>(elements);
  else if (part_ > 0)
    key.key = mix64(key.key ^ mix64(part_));
  return key;
}

Tape::~Tape() { current_tape = previous_; }

Tape* Tape::current() { return current_tape; }

void Tape::backward(const Var& loss, const std::function<void(Param&)>& ready, double scale) {
  check(loss.value().numel() == 1, "backward starts from a loss of one element, not from a tensor of shape ", loss.shape());
  const Tensor one = empty_like(loss.value());
  kernels::fill(one, scale);
  backward({loss}, {one}, ready);
}

void Tape::backward(const std::vector<Var>& outputs, const std::vector<Tensor>& gradients, const std::function<void(Param&)>& ready) {
  check(gradients.size() == outputs.size(), gradients.size(), " gradients for ", outputs.size(), " outputs");
  check(!run_, "this tape was run back already: backward consumes it");
  run_ = true;
  for (size_t i = 0; i < outputs.size(); ++i) {
    check(outputs[i].slot_ >= 0 && outputs[i].tape_ == id_, "backward from a value that this tape did not compute from anything trainable");
    check(gradients[i].shape() == outputs[i].shape() && gradients[i].dtype() == outputs[i].dtype(), "a gradient of shape ",
          gradients[i].shape(), " ", to_string(gradients[i].dtype()), " for an output of shape ", outputs[i].shape(), " ",
          to_string(outputs[i].dtype()));
    accumulate(outputs[i].slot_, gradients[i]);
  }
  run(ready);
}

void Tape::run(const std::function<void(Param&)>& ready) {
  Tape* const outer = current_tape;
  current_tape = nullptr;  // recipes and backward formulas record nothing
  struct Restore {
    Tape* tape;
    ~Restore() { current_tape = tape; }
  } restore{outer};
  while (!steps_.empty()) {
    Step step = std::move(steps_.back());  // owned here: its closure and what it keeps die at the end of this turn
    steps_.pop_back();
    const Scope scope(step.path);
    std::vector<Tensor> dy;
    bool any = false;
    for (int slot : step.outputs) {
      dy.push_back(std::move(gradients_[slot]));
      gradients_[slot] = Tensor();
      any = any || dy.back().defined();
    }
    if (any) {
      if (step.sum) *step.sum = take_sum(step.inputs[0], step.sum_dtype);
      Grads grads = step.backward(dy);
      step.backward = nullptr;
      dy.clear();
      check(grads.size() == step.inputs.size(), "the backward formula returned ", grads.size(), " gradients for ", step.inputs.size(),
            " inputs");
      for (size_t i = 0; i < grads.size(); ++i) {
        if (inspection_ && grads[i].defined()) inspection_(grads[i], "gradient of " + step.path);
        if (inspection_ && step.params[i] && step.params[i]->grad_written)
          inspection_(step.params[i]->grad, "gradient of " + step.params[i]->name);
        if (!grads[i].defined()) continue;
        if (step.inputs[i] >= 0)
          accumulate(step.inputs[i], std::move(grads[i]));
        else if (step.params[i] != nullptr)
          add_to_parameter(*step.params[i], grads[i]);
      }
    }
    for (Param* param : step.params)
      if (param != nullptr && --uses_[param] == 0 && ready) ready(*param);
  }
  uses_.clear();
}

namespace {
/// A gradient may be shared (add hands dy to both inputs): only one owner may write to it.
bool has_one_owner(const Tensor& gradient) { return gradient.buffer().use_count() == 1 && gradient.is_contiguous(); }
}  // namespace

Tensor Tape::take_sum(int slot, DType dtype) {
  if (slot < 0 || inspection_) return {};  // who inspects wants to see each term
  Tensor& have = gradients_[slot];
  const bool fits = have.defined() && have.dtype() == dtype && has_one_owner(have);
  return fits ? std::exchange(have, {}) : Tensor();
}

void Tape::accumulate(int slot, Tensor gradient) {
  Tensor& have = gradients_[slot];
  if (!have.defined()) {
    have = std::move(gradient);
    return;
  }
  const Tensor sum = has_one_owner(have) ? have : Tensor::empty(have.shape(), have.dtype(), have.device());
  kernels::add(have, gradient, sum);
  have = sum;
}

void Tape::check_finite() {
  inspect([this](const Tensor& t, const std::string& name) {
    if (!first_bad_.empty() || !is_floating(t.dtype()) || t.is_meta() || !t.is_contiguous()) return;
    int64_t at = -1;
    kernels::first_nonfinite(t, &at);
    if (at >= 0) first_bad_ = name;
  });
}

}  // namespace mesa
