#include "mesa/kernels/norm.h"
#include "mesa/ops/ops.h"

namespace mesa {
namespace {

Tensor room_for_sums(const Tensor& dx) {
  if (!is_gpu(dx.device()) || dx.dtype() == DType::f64) return {};
  return Tensor::empty({kernels::layer_norm_grad_parts(dx.rows(), dx.dim(-1)), dx.dim(-1)}, DType::f32, dx.device());
}

}  // namespace

Var layer_norm(const Var& x, const Var& gamma, const Var& beta, double eps, std::optional<DType> out) {
  const Op op("layer_norm", {x, gamma, beta});
  check(x.value().rank() >= 1, "layer_norm needs rows, not a single number");
  check(gamma.value().numel() == x.dim(-1) && beta.value().numel() == x.dim(-1), "gamma has ", gamma.value().numel(), " and beta ",
        beta.value().numel(), " elements but x ends in ", x.dim(-1));
  const DType type_y = out.value_or(x.dtype());
  const Tensor y = empty_like(x.value(), type_y), g = gamma.value(), b = beta.value();
  if (!op.recording()) {
    kernels::layer_norm(x.value(), g, b, eps, y, Tensor(), Tensor());
    return Var(y);
  }
  const Tensor rstd = Tensor::empty({x.value().rows()}, gamma.dtype(), y.device());
  const auto [ahead, codes] = op.open("xhat", y.shape(), type_y, y.device());
  Saved saved = ahead;
  if (saved.defined()) {
    kernels::layer_norm_codes(x.value(), g, b, eps, y, rstd, codes);
  } else {
    const Tensor xhat = empty_like(y);
    kernels::layer_norm(x.value(), g, b, eps, y, xhat, rstd);
    saved = op.save("xhat", xhat);
  }
  op.keep("rstd", rstd);
  const auto formula = [=, type_x = x.dtype(), dgamma = op.gradient(gamma), dbeta = op.gradient(beta)](const Tensor& dy,
                                                                                                       const Extras& extras) -> Grads {
    kernels::LayerNormGrads to;
    to.add_x = extras.sum.defined();
    to.dx = to.add_x ? extras.sum : empty_like(dy, type_x);
    to.dx_copy = extras.dx_copy, to.copy_factors = extras.copy_factors;
    if (extras.dx_sums) to.dx_sums = *extras.dx_sums = room_for_sums(to.dx);
    if (extras.y) to.y = *extras.y = may_overwrite(dy) ? dy : empty_like(dy);
    Grads grads{to.dx, Tensor(), Tensor()};
    // One pass computes all; the targets only say where the two parameter gradients go.
    grads[1] = dgamma.into([&](const Tensor& out, bool add) { to.dgamma = out, to.add_gamma = add; });
    grads[2] = dbeta.into([&](const Tensor& out, bool add) { to.dbeta = out, to.add_beta = add; });
    if (const auto coded = saved.coded_on_gpu())
      kernels::layer_norm_grad_coded(dy, *coded, rstd, g, b, to);
    else
      kernels::layer_norm_grad(dy, saved.get(), rstd, g, b, to);
    return grads;
  };
  const auto rebuild = [saved, g, b](const Tensor& again) {
    if (const auto coded = saved.coded_on_gpu())
      kernels::affine_coded(*coded, g, b, again);
    else
      kernels::affine(saved.get(), g, b, again);
  };
  return op.record(y, formula, {.adds = true, .rebuild = rebuild});
}

}  // namespace mesa
