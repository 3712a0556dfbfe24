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
    Step step = std::move(steps_.back());
    steps_.pop_back();
    run_step(std::move(step), ready);
  }
  uses_.clear();
  room_ = Tensor();
}

void Tape::run_step(Step step, const std::function<void(Param&)>& ready) {  // owned here: its closure and what it keeps die at the end
  {
    const Scope scope(step.path);
    std::vector<Tensor> dy;
    Tensor copy, sums;
    bool any = step.outputs.empty();  // a step that waited knows by itself
    for (int slot : step.outputs) {
      Slot taken = std::exchange(slots_[slot], {});
      any = any || taken.gradient.defined();
      dy.push_back(std::move(taken.gradient));
      copy = std::move(taken.copy), sums = std::move(taken.sums);
    }
    if (any) go_back(step, std::move(dy), std::move(copy), std::move(sums));
    for (Param* param : step.params)
      if (param != nullptr && --uses_[param] == 0 && ready) ready(*param);
  }
  for (Step& waiting : step.waiting) run_step(std::move(waiting), ready);
  if (step.again) *step.again = Tensor();
}

void Tape::go_back(Step& step, std::vector<Tensor> dy, Tensor copy, Tensor sums) {
  if (step.extras) offer(step, dy[0], copy), step.extras->dy_sums = std::move(sums);
  copy = Tensor();
  Grads grads = step.backward(dy);
  step.backward = nullptr;
  dy.clear();
  const Extras extras = step.extras ? std::exchange(*step.extras, {}) : Extras();
  check(grads.size() == step.inputs.size(), "the backward formula returned ", grads.size(), " gradients for ", step.inputs.size(),
        " inputs");
  for (size_t i = 0; i < grads.size(); ++i) {
    if (inspection_ && grads[i].defined()) inspection_(grads[i], "gradient of " + step.path);
    if (inspection_ && step.params[i] && step.params[i]->grad_written)
      inspection_(step.params[i]->grad, "gradient of " + step.params[i]->name);
    if (!grads[i].defined()) continue;
    check(!step.outputs.empty() || step.params[i] != nullptr, "a gradient that waited came too late for input ", i);
    if (step.inputs[i] >= 0) {
      accumulate(step.inputs[i], std::move(grads[i]));
      if (i == 0) slots_[step.inputs[0]].copy = extras.dx_copy, slots_[step.inputs[0]].sums = std::move(step.sums);
    } else if (step.params[i] != nullptr)
      add_to_parameter(*step.params[i], grads[i]);
  }
}

bool may_overwrite(const Tensor& gradient) { return gradient.buffer().use_count() == 1 && gradient.is_contiguous(); }

void Tape::offer(Step& step, const Tensor& dy, const Tensor& copy) {
  Extras& to = *step.extras;
  if (step.products) to.dy = copy.defined() ? copy : in_form(*step.products, dy);
  if (!step.waiting.empty()) to.y = step.again.get();
  if (step.inputs[0] < 0 || inspection_) return;  // who inspects wants to see each term
  Slot& x = slots_[step.inputs[0]];
  if (step.adds) {
    // A gradient may be shared (add hands dy to both inputs): only one owner may write to it.
    if (x.gradient.defined() && x.gradient.dtype() == step.dtype_x && may_overwrite(x.gradient)) to.sum = std::exchange(x.gradient, {});
    x.copy = Tensor();
  }
  if (x.gradient.defined()) return;  // not the last to add to it
  const bool masked = x.products && x.products->factors.defined(), samples = dy.rank() > 1 && dy.numel() > 0;
  if (step.adds && x.products && x.products->dtype == DType::bf16 && step.dtype_x == DType::f32 && (samples || !masked))
    to.dx_copy = room_for_copy(dy, DType::bf16), to.copy_factors = x.products->factors;
  if (x.wants_sums && (!masked || to.dx_copy.defined())) to.dx_sums = &step.sums;
}

Tensor Tape::in_form(const GradientForm& form, const Tensor& dy) {
  const bool same = form.dtype == dy.dtype();
  if (same && !form.factors.defined()) return dy;
  // The room stays until the pass ends: for a copy in bf16, not for one as large as the gradient.
  const Tensor made = same ? empty_like(dy) : room_for_copy(dy, form.dtype);
  if (!form.factors.defined()) {
    kernels::copy(dy, made);
  } else if (dy.numel() > 0) {
    const Shape samples{dy.dim(0), dy.numel() / dy.dim(0)};
    kernels::scale_rows(dy.reshape(samples), form.factors, made.reshape(samples));
  }
  return made;
}

Tensor Tape::room_for_copy(const Tensor& dy, DType dtype) {
  const bool fits = room_.defined() && room_.shape() == dy.shape() && room_.dtype() == dtype && room_.device() == dy.device();
  if (!fits || room_.buffer().use_count() > 1) room_ = Tensor();
  if (!room_.defined()) room_ = empty_like(dy, dtype);
  return room_;
}

void Tape::accumulate(int slot, Tensor gradient) {
  Slot& have = slots_[slot];
  have.copy = have.sums = Tensor();
  if (!have.gradient.defined()) {
    have.gradient = std::move(gradient);
    return;
  }
  const Tensor& first = have.gradient;
  const Tensor sum = may_overwrite(first) ? first : empty_like(first);
  kernels::add(first, gradient, sum);
  have.gradient = sum;
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
