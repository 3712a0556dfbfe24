#include "mesa/kernels/norm.h"
#include "mesa/ops/ops.h"

namespace mesa {

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
  const Var result = op.record(
      y, x,
      [=, type_x = x.dtype(), dgamma = op.gradient(gamma), dbeta = op.gradient(beta)](const Tensor& dy, const Tensor& residual) -> Grads {
        const bool add_x = residual.defined();  // its gradient
        const Tensor dx = add_x ? residual : empty_like(dy, type_x);
        Grads grads{dx, Tensor(), Tensor()};
        // One pass computes all three; the targets only say where the two parameter gradients go.
        Tensor to_gamma, to_beta;
        bool add_gamma = false, add_beta = false;
        grads[1] = dgamma.into([&](const Tensor& out, bool add) { to_gamma = out, add_gamma = add; });
        grads[2] = dbeta.into([&](const Tensor& out, bool add) { to_beta = out, add_beta = add; });
        if (const auto coded = saved.coded_on_gpu())
          kernels::layer_norm_grad_coded(dy, *coded, rstd, g, dx, to_gamma, to_beta, add_x, add_gamma, add_beta);
        else
          kernels::layer_norm_grad(dy, saved.get(), rstd, g, dx, to_gamma, to_beta, add_x, add_gamma, add_beta);
        return grads;
      });
  return result.with_recipe([saved, g, b, shape = y.shape(), type_y, device = y.device()] {
    const Tensor y = Tensor::empty(shape, type_y, device);
    if (const auto coded = saved.coded_on_gpu())
      kernels::affine_coded(*coded, g, b, y);
    else
      kernels::affine(saved.get(), g, b, y);
    return y;
  });
}

}  // namespace mesa
