#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/matmul.h"
#include "mesa/ops/ops.h"
#include "weight_grad.h"

namespace mesa {
namespace {

/// The weight in the dtype that products run in.
Tensor weight_as(const Var& w, DType dtype) { return w.param() ? w.param()->as(dtype) : w.value(); }

Tensor flatten(const Tensor& x) { return x.reshape({x.rows(), x.dim(-1)}); }

std::vector<Var> defined_of(std::vector<Var> vars) {
  std::erase_if(vars, [](const Var& v) { return !v.defined(); });
  return vars;
}

}  // namespace

Var linear(const Var& x, const Var& w, const Var& b, std::optional<DType> out, const Var& residual) {
  const Op op("linear", defined_of({x, w, b, residual}));
  check(x.value().rank() >= 1, "linear needs rows, not a single number");
  check(w.value().rank() == 2 && x.dim(-1) == w.dim(1), "linear: x ends in ", x.dim(-1), " but the weight is ", w.shape());
  const Shape shape = x.shape().with(-1, w.dim(0));
  check(!residual.defined() || residual.shape() == shape, "linear: a residual of shape ", residual.shape(), " for a result of shape ",
        shape);
  const Tensor weight = weight_as(w, x.dtype());
  const Tensor y = Tensor::empty(shape, residual.defined() ? residual.dtype() : out.value_or(x.dtype()), x.value().device());
  kernels::matmul(flatten(x.value()), weight.transpose(0, 1), flatten(y), b.value(),
                  residual.defined() ? flatten(residual.value()) : Tensor());
  const Saved sx = op.wants(w) ? op.save("x", x) : Saved();  // a frozen weight keeps nothing
  return op.record(y,
                   [=, to_x = op.wants(x), to_residual = residual.defined() && op.wants(residual), type_x = x.dtype(), shape_x = x.shape(),
                    dw = op.gradient(w), db = b.defined() ? op.gradient(b) : Target(), has_bias = b.defined(),
                    has_residual = residual.defined()](const Tensor& dy_) -> Grads {
                     Tensor dy = flatten(dy_);
                     if (dy.dtype() != type_x) {  // products need one dtype
                       dy = empty_like(dy, type_x);
                       kernels::copy(flatten(dy_), dy);
                     }
                     Tensor dx;
                     const auto [to_w, to_b] = weight_and_bias_grads(dw, db, dy, [&] { return flatten(sx.get()); });
                     if (to_x) {
                       dx = Tensor::empty(shape_x, type_x, dy.device());
                       kernels::matmul(dy, weight, flatten(dx));
                     }
                     Grads grads{dx, to_w};
                     if (has_bias) grads.push_back(to_b);
                     if (has_residual) grads.push_back(to_residual ? dy_ : Tensor());
                     return grads;
                   });
}

}  // namespace mesa
