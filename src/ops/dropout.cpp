#include "mesa/base/scope.h"
#include "mesa/kernels/elementwise.h"
#include "mesa/ops/ops.h"

namespace mesa {
namespace {

void check_probability(const char* name, double p) { check(p >= 0 && p < 1, name, " with probability ", p, "; it must lie in [0, 1)"); }

}  // namespace

Var dropout(const Var& x, double p) {
  check_probability("dropout", p);
  const Op op("dropout", {x});
  const Tape* const tape = Tape::current();
  if (p == 0 || tape == nullptr) return x;  // the tape tells training: an input from frozen layers is masked as well
  const RandomKey key = tape->random(Scope::join("dropout"), x.value().numel(), 4);
  const auto apply = [p, key](const Tensor& t) {  // the mask is drawn again each time: nothing to keep
    const Tensor out = empty_like(t);
    kernels::dropout(t, out, p, key);
    return out;
  };
  const Var result = op.record(apply(x.value()), [apply](const Tensor& dy) -> Grads { return {apply(dy)}; });
  if (x.recipe() == nullptr) return result;
  return result.with_recipe(x.recipe()->then(apply));
}

Var add_drop_path(const Var& x, const Var& branch, double p) {
  check_probability("drop_path", p);
  const Tape* const tape = Tape::current();
  if (p == 0 || tape == nullptr) return add(x, branch);
  const Op op("drop_path", {branch, x});  // as the layer is called everywhere, and the stream of its random numbers
  check(x.shape() == branch.shape() && x.value().rank() >= 1, "drop_path: a branch of shape ", branch.shape(), " beside ", x.shape());
  const Tensor y = empty_like(x.value());
  const Tensor factors = Tensor::empty({x.dim(0)}, y.dtype() == DType::f64 ? DType::f64 : DType::f32, y.device());
  kernels::add_drop_path(x.value(), branch.value(), p, tape->random(Scope::join("drop_path"), x.dim(0), 1), y, factors);
  if (!op.wants(branch)) return op.record(y, [](const Tensor& dy) -> Grads { return {Tensor(), dy}; });
  const auto formula = [to_x = op.wants(x)](const Tensor& dy, const Extras& extras) -> Grads {
    if (extras.dx_sums) *extras.dx_sums = extras.dy_sums;
    return {extras.dy, to_x ? dy : Tensor()};
  };
  return op.record(y, formula, {.products = GradientForm(branch.dtype(), op.keep("factors", factors)), .sums = op.wants_sums(branch)});
}

}  // namespace mesa
