#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/matmul.h"
#include "mesa/ops/ops.h"

namespace mesa {
namespace {

/// The weight in the dtype that products run in.
Tensor weight_as(const Var& w, DType dtype) { return w.param() ? w.param()->as(dtype) : w.value(); }

Tensor flatten(const Tensor& x) { return x.reshape({x.rows(), x.dim(-1)}); }

}  // namespace

Var linear(const Var& x, const Var& w, const Var& b, std::optional<DType> out) {
  const Op op("linear", b.defined() ? std::vector<Var>{x, w, b} : std::vector<Var>{x, w});
  check(x.value().rank() >= 1, "linear needs rows, not a single number");
  check(w.value().rank() == 2 && x.dim(-1) == w.dim(1), "linear: x ends in ", x.dim(-1), " but the weight is ", w.shape());
  const Tensor weight = weight_as(w, x.dtype());
  const Tensor y = Tensor::empty(x.shape().with(-1, w.dim(0)), out.value_or(x.dtype()), x.value().device());
  kernels::matmul(flatten(x.value()), weight.transpose(0, 1), flatten(y), b.value());
  const Saved sx = op.wants(w) ? op.save("x", x) : Saved();  // a frozen weight keeps nothing
  return op.record(y, [=, to_x = op.wants(x), type_x = x.dtype(), shape_x = x.shape(), dw = op.gradient(w),
                       db = b.defined() ? op.gradient(b) : Target(), has_bias = b.defined()](const Tensor& dy_) -> Grads {
    Tensor dy = flatten(dy_);
    if (dy.dtype() != type_x) {  // products need one dtype
      dy = empty_like(dy, type_x);
      kernels::copy(flatten(dy_), dy);
    }
    Grads grads(has_bias ? 3 : 2);
    // One product computes both; the targets only say where the two gradients go.
    Tensor to_w, to_b;
    bool add_w = false, add_b = false;
    grads[1] = dw.into([&](const Tensor& out, bool add) { to_w = out, add_w = add; });
    if (has_bias) grads[2] = db.into([&](const Tensor& out, bool add) { to_b = out, add_b = add; });
    if (to_w.defined()) kernels::matmul_weight_grad(dy, flatten(sx.get()), to_w, add_w, to_b, add_b);
    else if (to_b.defined()) kernels::sum_rows(dy, to_b, add_b);
    if (to_x) {
      grads[0] = Tensor::empty(shape_x, type_x, dy.device());
      kernels::matmul(dy, weight, flatten(grads[0]));
    }
    return grads;
  });
}

}  // namespace mesa
