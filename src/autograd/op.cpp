#include <utility>

#include "mesa/autograd/tape.h"
#include "mesa/base/scope.h"
#include "mesa/kernels/elementwise.h"

namespace mesa {

Tensor Param::as(DType dtype) {
  if (dtype == value.dtype()) return value;
  check(dtype == DType::bf16, "parameter ", name, " cannot be used as ", to_string(dtype));
  if (!copy_.defined()) copy_ = Tensor::empty(value.shape(), DType::bf16, value.device(), MemoryKind::parameters);
  if (copy_stale_) kernels::copy(value, copy_);
  copy_stale_ = false;
  return copy_;
}

Var::Var(Param& param) : value_(param.value), param_(&param) {}

Var Var::with_recipe(Recipe recipe) const {
  Var out = *this;
  out.recipe_ = std::make_shared<const Recipe>(std::move(recipe));
  return out;
}

Var Var::without_trace() const {
  Var out = *this;
  out.leaves_trace_ = false;
  return out;
}

Tensor Target::into(const std::function<void(const Tensor& out, bool accumulate)>& write) const {
  if (!wanted_) return {};
  if (param_ == nullptr) {
    const Tensor out = Tensor::empty(shape_, dtype_, device_);
    write(out, false);
    return out;
  }
  if (!param_->grad.defined()) param_->grad = Tensor::empty(shape_, dtype_, device_, MemoryKind::gradients);
  write(param_->grad, param_->grad_written);
  param_->grad_written = true;
  return {};
}

Op::Op(const char* name, std::vector<Var> inputs) : name_(name), inputs_(std::move(inputs)), tape_(nullptr) {
  for (const Var& x : inputs_) {
    check(x.defined(), name, " got an undefined input");
    if (x.requires_grad()) tape_ = Tape::current();
  }
}

Site Op::site(const char* slot) const { return {Scope::path().empty() ? name_ : Scope::path(), slot, Scope::heads()}; }

Saved Op::save(const char* slot, const Var& x) const {
  if (!recording()) return {};
  return tape_->policy().save(x.value(), site(slot), x.recipe(), !x.requires_grad() || !x.leaves_trace());
}

SavedAhead Op::open(const char* slot, const Shape& shape, DType dtype, Device device) const {
  return recording() ? tape_->policy().open(site(slot), shape, dtype, device) : SavedAhead{};
}

SavedAhead Op::open(const char* slot, const Tensor& x) const { return recording() ? tape_->policy().open(site(slot), x) : SavedAhead{}; }

bool Op::shares_input(const char* slot, DType dtype) const { return recording() && tape_->policy().shares_input(site(slot), dtype); }

Saved Op::save(const char* slot, const Tensor& x) const { return save(slot, Var(x)); }

Tensor Op::keep(const char* slot, const Tensor& statistic) const {
  if (recording()) tape_->policy().keep(statistic, site(slot));
  return statistic;
}

Target Op::gradient(const Var& input) const {
  Target target;
  if (!wants(input)) return target;
  target.wanted_ = true;
  target.param_ = input.param();
  target.shape_ = input.shape();
  target.dtype_ = input.dtype();
  target.device_ = input.value().device();
  return target;
}

bool Op::wants_sums(const Var& x) const { return wants(x) && x.slot_ >= 0 && tape_->slots_[static_cast<size_t>(x.slot_)].wants_sums; }

Var Op::record(const Tensor& y, std::function<Grads(const Tensor& dy)> backward) const {
  return record(std::vector<Tensor>{y}, [backward = std::move(backward)](const std::vector<Tensor>& dy) { return backward(dy[0]); })[0];
}

Var Op::record(const Tensor& y, std::function<Grads(const Tensor& dy, const Extras& extras)> formula, Abilities can) const {
  if (!recording()) return Var(y);
  const auto extras = std::make_shared<Extras>();
  const auto recipe = can.value.recipe();
  const bool waits = can.of_value && recipe && recipe->beside >= 0;
  const auto late = std::make_shared<Extras>();  // for a formula that waits
  Var out = record({y}, [=, of_value = waits ? nullptr : can.of_value](const std::vector<Tensor>& dy) {
    const Grads others = of_value ? of_value(*extras) : Grads();
    Grads grads = formula(dy[0], *extras);
    for (size_t i = 0; i < others.size(); ++i)
      if (others[i].defined()) grads[i] = others[i];
    if (waits) late->dy = extras->dy, late->dy_sums = extras->dy_sums;
    return grads;
  })[0];
  Tape::Step& step = tape_->steps_.back();
  step.extras = extras, step.adds = can.adds, step.dtype_x = inputs_[0].dtype();
  Tape::Slot& slot = tape_->slots_[static_cast<size_t>(out.slot_)];
  slot.products = step.products = can.products, slot.wants_sums = can.sums;
  if (waits) {
    Tape::Step rest;
    rest.path = step.path, rest.params = step.params, rest.inputs.assign(inputs_.size(), -1);
    rest.backward = [late, n = inputs_.size(), of_value = can.of_value](const std::vector<Tensor>&) {
      return late->dy.defined() ? of_value(*late) : Grads(n);
    };
    for (Param* param : rest.params)
      if (param != nullptr) ++tape_->uses_[param];
    tape_->steps_[static_cast<size_t>(recipe->beside)].waiting.push_back(std::move(rest));
  }
  if (!can.rebuild) return out;
  step.again = std::make_shared<Tensor>();
  const auto alone = [rebuild = std::move(can.rebuild), again = step.again, shape = y.shape(), dtype = y.dtype(), device = y.device()] {
    if (again->defined()) return *again;
    const Tensor fresh = Tensor::empty(shape, dtype, device);
    rebuild(fresh);
    return fresh;
  };
  return out.with_recipe({alone, static_cast<int>(tape_->steps_.size()) - 1});
}

std::vector<Var> Op::record(const std::vector<Tensor>& ys, Backward backward) const {
  std::vector<Var> out(ys.begin(), ys.end());
  if (!recording()) return out;
  Tape::Step step;
  step.path = Scope::join(name_);
  for (Var& y : out) {
    y.slot_ = static_cast<int>(tape_->slots_.size());
    y.tape_ = tape_->id_;
    tape_->slots_.emplace_back();
    step.outputs.push_back(y.slot_);
    if (tape_->inspection_) tape_->inspection_(y.value(), step.path);
  }
  for (const Var& x : inputs_) {
    check(x.slot_ < 0 || x.tape_ == tape_->id_, name_, " uses a value that another tape recorded");
    step.inputs.push_back(x.slot_);
    Param* const param = x.requires_grad() ? x.param() : nullptr;
    step.params.push_back(param);
    if (param != nullptr) ++tape_->uses_[param];
  }
  step.backward = std::move(backward);
  tape_->steps_.push_back(std::move(step));
  return out;
}

}  // namespace mesa
