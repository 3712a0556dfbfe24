#include <algorithm>

#include "gradients.h"
#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/matmul.h"
#include "mesa/kernels/norm.h"
#include "mesa/ops/ops.h"

namespace mesa {
namespace {

/// The weight in the dtype that products run in.
Tensor weight_as(const Var& w, DType dtype) { return w.param() ? w.param()->as(dtype) : w.value(); }

/// The bias as a GPU's epilogues want it beside a result in bf16: a copy that the optimizer keeps fresh, not one for each product.
Tensor bias_as(const Var& b, const Tensor& y) {
  return is_gpu(y.device()) && y.dtype() == DType::bf16 && b.defined() ? weight_as(b, DType::bf16) : b.value();
}

Tensor flatten(const Tensor& x) { return x.reshape({x.rows(), x.dim(-1)}); }

/// True if nothing but parameters takes gradients: these may wait (Abilities::value).
bool only_parameters(const Op& op, std::initializer_list<Var> vars) {
  return std::all_of(vars.begin(), vars.end(), [&](const Var& v) { return !v.defined() || !op.wants(v) || v.param() != nullptr; });
}

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
  kernels::matmul(flatten(x.value()), weight.transpose(0, 1), flatten(y), bias_as(b, y),
                  residual.defined() ? flatten(residual.value()) : Tensor());
  const Saved sx = op.wants(w) ? op.save("x", x) : Saved();  // a frozen weight keeps nothing
  const size_t inputs = defined_of({x, w, b, residual}).size();
  const auto formula = [=, to_x = op.wants(x), to_residual = residual.defined() && op.wants(residual), type_x = x.dtype(),
                        shape_x = x.shape()](const Tensor& dy, const Extras& extras) -> Grads {
    Grads grads(inputs);
    if (to_x) {
      grads[0] = Tensor::empty(shape_x, type_x, dy.device());
      kernels::matmul(flatten(extras.dy), weight, flatten(grads[0]));
    }
    if (to_residual) grads.back() = dy;
    return grads;
  };
  const auto of_parameters = [=, dw = op.gradient(w), db = b.defined() ? op.gradient(b) : Target(),
                              has_bias = b.defined()](const Extras& extras) -> Grads {
    Grads grads(inputs);
    const auto rows = [&] { return flatten(sx.get()); };
    const auto [to_w, to_b] = weight_and_bias_grads(dw, db, flatten(extras.dy), rows, extras.dy_sums);
    grads[1] = to_w;
    if (has_bias) grads[2] = to_b;
    return grads;
  };
  return op.record(y, formula,
                   {.products = x.dtype(),
                    .sums = b.defined() && op.wants(b),
                    .value = only_parameters(op, {w, b}) ? sx : Saved(),
                    .of_value = of_parameters});
}

Var scaled_linear(const Var& x, const Var& w, const Var& b, const Var& gamma, std::optional<DType> out, const Var& residual) {
  const Op op("scaled_linear", defined_of({x, w, b, gamma, residual}));
  check(w.value().rank() == 2 && b.defined() && x.value().rank() >= 1 && x.dim(-1) == w.dim(1), "scaled_linear: x ends in ", x.dim(-1),
        " but the weight is ", w.shape());
  check(gamma.shape() == Shape({w.dim(0)}) && b.shape() == gamma.shape(), "scaled_linear: gamma ", gamma.shape(), " and bias ", b.shape(),
        " for ", w.dim(0), " outputs");
  const Shape shape = x.shape().with(-1, w.dim(0));
  check(!residual.defined() || residual.shape() == shape, "scaled_linear: a residual of shape ", residual.shape(),
        " for a result of shape ", shape);
  const Tensor g = gamma.value(), weight = w.value(), bias = b.value();
  const auto scaled_weight = [=, type = x.dtype()] {
    const Tensor scaled = empty_like(weight, type);
    kernels::scale_rows(weight, g, scaled);
    return scaled;
  };
  const Tensor scaled_bias = empty_like(bias);
  kernels::mul(bias, g, scaled_bias);
  const Tensor y = Tensor::empty(shape, residual.defined() ? residual.dtype() : out.value_or(x.dtype()), x.value().device());
  kernels::matmul(flatten(x.value()), scaled_weight().transpose(0, 1), flatten(y), scaled_bias,
                  residual.defined() ? flatten(residual.value()) : Tensor());
  const bool learns = op.wants(w) || op.wants(gamma);
  const Saved sx = learns ? op.save("x", x) : Saved();
  const size_t inputs = residual.defined() ? 5 : 4;
  const auto formula = [=, to_x = op.wants(x), to_residual = residual.defined() && op.wants(residual), type_x = x.dtype(),
                        shape_x = x.shape()](const Tensor& dy, const Extras& extras) -> Grads {
    Grads grads(inputs);
    if (to_x) {
      grads[0] = Tensor::empty(shape_x, type_x, dy.device());
      kernels::matmul(flatten(extras.dy), scaled_weight(), flatten(grads[0]));
    }
    if (to_residual) grads[4] = dy;
    return grads;
  };
  const auto of_parameters = [=, dw = op.gradient(w), db = op.gradient(b), dgamma = op.gradient(gamma)](const Extras& extras) -> Grads {
    const Tensor dy = flatten(extras.dy);
    Grads grads(inputs);
    // With W = gamma w and B = gamma b: dgamma = sum_i dW_i w_i + dB b, dw = gamma dW, db = gamma dB.
    const Tensor d_weight = learns ? empty_like(weight) : Tensor(), d_bias = empty_like(bias);
    const Tensor sums = extras.dy_sums.defined() ? extras.dy_sums : learns ? Tensor() : dy;
    if (learns) kernels::matmul_weight_grad(dy, flatten(sx.get()), d_weight, false, sums.defined() ? Tensor() : d_bias, false);
    if (sums.defined() && (learns || db.wanted())) kernels::sum_rows(sums, d_bias, false);
    grads[3] = dgamma.into([&](const Tensor& to, bool add) {
      const int64_t O = weight.dim(0), I = weight.dim(1);
      const Tensor products = Tensor::empty({1, 1, O}, g.dtype(), g.device()), sum = empty_like(d_bias);
      kernels::attention_delta(d_weight.reshape({1, O, I}), weight.reshape({1, O, I}), products);  // of rows
      kernels::mul(d_bias, bias, sum);
      kernels::add(sum, products.reshape({O}), sum);
      put(sum, to, add);
    });
    grads[1] = dw.into([&](const Tensor& to, bool add) {
      const Tensor term = add ? empty_like(d_weight) : to;
      kernels::scale_rows(d_weight, g, term);
      if (add) kernels::add(to, term, to);
    });
    grads[2] = db.into([&](const Tensor& to, bool add) {
      kernels::mul(d_bias, g, d_bias);
      put(d_bias, to, add);
    });
    return grads;
  };
  return op.record(y, formula,
                   {.products = x.dtype(),
                    .sums = learns || op.wants(b),
                    .value = only_parameters(op, {w, b, gamma}) ? sx : Saved(),
                    .of_value = of_parameters});
}

}  // namespace mesa
