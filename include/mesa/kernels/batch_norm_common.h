// What batch norm's kernels of every backend check of their arguments.
#pragma once
#include "mesa/kernels/batch_norm.h"
#include "mesa/kernels/common.h"

namespace mesa::kernels::MESA_ISA {
namespace {

inline void check_batch_statistics(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& running_mean,
                                   const Tensor& running_var) {
  const int64_t width = width_of(x);
  check_flat(x, "batch_statistics: x");
  check(x.rows() > 1, "batch statistics need more than one row a channel, not x ", x.shape());
  check_parameter(mean, width, "mean"), check_parameter(rstd, width, "rstd");
  if (running_mean.defined()) check_parameter(running_mean, width, "running_mean"), check_parameter(running_var, width, "running_var");
}

inline void check_batch_norm(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& gamma, const Tensor& beta,
                             const Tensor& y, const Tensor& xhat) {
  const int64_t width = width_of(x);
  check_alike(x, y, "batch_norm");
  if (xhat.defined()) check_alike(xhat, y, "batch_norm: xhat");
  check_parameter(mean, width, "mean"), check_parameter(rstd, width, "rstd");
  check_parameter(gamma, width, "gamma"), check_parameter(beta, width, "beta");
}

inline void check_batch_norm_sums(const Tensor& dy, const Tensor& xhat, const Tensor& dgamma, const Tensor& dbeta) {
  const int64_t width = width_of(dy);
  check_alike(dy, xhat, "batch_norm_sums");
  check_parameter(dgamma, width, "dgamma"), check_parameter(dbeta, width, "dbeta");
}

inline void check_batch_norm_grad(const Tensor& dy, const Tensor& xhat, const Tensor& rstd, const Tensor& gamma, const Tensor& dgamma,
                                  const Tensor& dbeta, const Tensor& dx) {
  const int64_t width = width_of(dy);
  check_alike(dy, xhat, "batch_norm_grad: xhat");
  check_alike(dy, dx, "batch_norm_grad: dx");
  check_parameter(rstd, width, "rstd"), check_parameter(gamma, width, "gamma");
  check_parameter(dgamma, width, "dgamma"), check_parameter(dbeta, width, "dbeta");
}

}  // namespace
}  // namespace mesa::kernels::MESA_ISA
