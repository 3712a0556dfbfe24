#include "mesa/kernels/matmul.h"

#include "mesa/ops/ops.h"

namespace mesa {

Var matmul(const Var& a, const Var& b, bool transpose_b) {
  const Op op("matmul", {a, b});
  const auto maybe_transposed = [transpose_b](const Tensor& t) { return transpose_b ? t.transpose(-1, -2) : t; };
  const Tensor right = maybe_transposed(b.value());
  check(a.value().rank() >= 2 && a.value().rank() == right.rank() && a.dim(-1) == right.dim(-2), "cannot multiply ", a.shape(), " by ",
        right.shape());
  const Tensor y = Tensor::empty(a.shape().with(-1, right.dim(-1)), a.dtype(), a.value().device());
  kernels::matmul(a.value(), right, y);
  const Saved sa = op.wants(b) ? op.save("a", a) : Saved(), sb = op.wants(a) ? op.save("b", b) : Saved();
  return op.record(y, [=, da = op.gradient(a), db = op.gradient(b)](const Tensor& dy) -> Grads {
    return {da.into([&](const Tensor& out, bool accumulate) {
              kernels::matmul(dy, maybe_transposed(sb.get()).transpose(-1, -2), out, {}, accumulate ? out : Tensor());
            }),
            db.into([&](const Tensor& out, bool accumulate) {
              kernels::matmul(sa.get().transpose(-1, -2), dy, maybe_transposed(out), {}, accumulate ? maybe_transposed(out) : Tensor());
            })};
  });
}

}  // namespace mesa
