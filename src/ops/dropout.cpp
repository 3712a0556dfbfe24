#include "mesa/base/scope.h"
#include "mesa/kernels/elementwise.h"
#include "mesa/ops/ops.h"

namespace mesa {
namespace {

template <class MaskKernel>
Var masked(const char* name, const MaskKernel& kernel, const Var& x, double p, int64_t decisions, int64_t at_once) {
  check(p >= 0 && p < 1, name, " with probability ", p, "; it must lie in [0, 1)");
  const Op op(name, {x});
  const Tape* const tape = Tape::current();
  if (p == 0 || tape == nullptr) return x;  // the tape tells training: an input from frozen layers is masked as well
  const Tensor y = empty_like(x.value());
  const RandomKey key = tape->random(Scope::join(name), decisions, at_once);
  kernel(x.value(), y, p, key);
  const auto apply = [&kernel, p, key](const Tensor& t) {  // the mask is drawn again each time: nothing to keep
    const Tensor out = empty_like(t);
    kernel(t, out, p, key);
    return out;
  };
  const Var result = op.record(y, [apply](const Tensor& dy) -> Grads { return {apply(dy)}; });
  if (x.recipe() == nullptr) return result;
  return result.with_recipe(x.recipe()->then(apply));
}

}  // namespace

Var dropout(const Var& x, double p) { return masked("dropout", kernels::dropout, x, p, x.value().numel(), 4); }

Var drop_path(const Var& x, double p) { return masked("drop_path", kernels::drop_path, x, p, x.dim(0), 1); }

}  // namespace mesa
