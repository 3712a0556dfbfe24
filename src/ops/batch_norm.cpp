#include "mesa/kernels/batch_norm.h"

#include "gradients.h"
#include "mesa/kernels/norm.h"
#include "mesa/ops/ops.h"

namespace mesa {
namespace {

/// gamma xhat + beta again, from what is kept of xhat.
Recipe affine_of(const Saved& saved, const Tensor& gamma, const Tensor& beta, const Tensor& like) {
  return {[saved, gamma, beta, shape = like.shape(), type = like.dtype(), device = like.device()] {
    const Tensor y = Tensor::empty(shape, type, device);
    if (const auto coded = saved.coded_on_gpu())
      kernels::affine_coded(*coded, gamma, beta, y);
    else
      kernels::affine(saved.get(), gamma, beta, y);
    return y;
  }};
}

/// With statistics that do not depend on x the op is an affine function of each channel.
Grads scaled_by(const Tensor& dy, const Tensor& gamma, const Tensor& rstd) {
  const Tensor factor = empty_like(gamma), zero = empty_like(gamma), dx = empty_like(dy);
  kernels::mul(gamma, rstd, factor);
  kernels::fill(zero, 0);
  kernels::affine(dy, factor, zero, dx);
  return {dx, Tensor(), Tensor()};
}

}  // namespace

Var batch_norm(const Var& x, const Var& gamma, const Var& beta, const RunningStatistics& running, double eps) {
  const Op op("batch_norm", {x, gamma, beta});
  const int64_t C = x.value().rank() > 0 ? x.dim(-1) : 0;
  for (const Tensor& t : {gamma.value(), beta.value(), running.mean, running.var})
    check(t.shape() == Shape({C}), "batch_norm of ", x.shape(), " with a value ", t.shape(), " for each channel");
  const Tensor y = empty_like(x.value()), g = gamma.value(), b = beta.value(), rstd = empty_like(g);
  const bool learns = op.wants(gamma) || op.wants(beta);
  Tensor mean = running.mean;
  if (learns) {
    check(x.value().rows() > 1, "a batch norm in training needs more than one value a channel, and x is ", x.shape(),
          ": a larger batch or larger images");
    mean = empty_like(g);
    kernels::batch_statistics(x.value(), eps, running.momentum, mean, rstd, running.mean, running.var);
  } else {
    kernels::inverse_deviation(running.var, eps, rstd);
  }
  const Tensor xhat = learns ? empty_like(y) : Tensor();
  kernels::batch_norm(x.value(), mean, rstd, g, b, y, xhat);
  if (!op.recording()) return Var(y);
  if (!learns) {
    op.keep("rstd", rstd);
    return op.record(y, [g, rstd](const Tensor& dy) -> Grads { return scaled_by(dy, g, rstd); }).without_trace();
  }
  const Saved saved = op.save("xhat", xhat);
  op.keep("rstd", rstd);
  const auto backward = [=, to_x = op.wants(x), dgamma = op.gradient(gamma), dbeta = op.gradient(beta)](const Tensor& dy) -> Grads {
    const Tensor h = saved.get(), sum_gamma = empty_like(g), sum_beta = empty_like(g);
    kernels::batch_norm_sums(dy, h, sum_gamma, sum_beta);
    Grads grads(3);
    grads[1] = dgamma.into([&](const Tensor& to, bool add) { put(sum_gamma, to, add); });
    grads[2] = dbeta.into([&](const Tensor& to, bool add) { put(sum_beta, to, add); });
    if (to_x) {
      grads[0] = empty_like(dy);
      kernels::batch_norm_grad(dy, h, rstd, g, sum_gamma, sum_beta, grads[0]);
    }
    return grads;
  };
  return op.record(y, backward).with_recipe(affine_of(saved, g, b, y));
}

}  // namespace mesa
