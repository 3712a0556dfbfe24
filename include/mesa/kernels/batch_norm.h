// Batch normalization (Ioffe and Szegedy, 2015) of rows [.., C]: each channel over all rows. Statistics run in f32 (f64 for f64).
#pragma once
#include "mesa/kernels/kernel.h"

namespace mesa::kernels {

// x, y, xhat, dy, dx are contiguous, f32|bf16|f64 and of one shape [.., C]; what has one value a channel is f32 (f64 for f64).

/// mean[c] of the rows and rstd[c] <- 1 / sqrt(var + eps) with the biased variance. If running_mean is defined, both running statistics
/// move by momentum towards the mean and the unbiased variance, as PyTorch's do. Sums are in an order that does not depend on the threads.
MESA_KERNEL(batch_statistics, const Tensor& x, double eps, double momentum, const Tensor& mean, const Tensor& rstd,
            const Tensor& running_mean, const Tensor& running_var);
/// rstd[c] <- 1 / sqrt(var[c] + eps).
MESA_KERNEL(inverse_deviation, const Tensor& var, double eps, const Tensor& rstd);
/// xhat <- (x - mean) rstd, y <- gamma xhat + beta, bit for bit what `affine` makes of xhat in f32 and f64. An undefined xhat is not
/// written.
MESA_KERNEL(batch_norm, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& gamma, const Tensor& beta, const Tensor& y,
            const Tensor& xhat);
/// dgamma[c] <- sum dy xhat, dbeta[c] <- sum dy, in an order that does not depend on the threads.
MESA_KERNEL(batch_norm_sums, const Tensor& dy, const Tensor& xhat, const Tensor& dgamma, const Tensor& dbeta);
/// dx <- gamma rstd (dy - dbeta / rows - xhat dgamma / rows).
MESA_KERNEL(batch_norm_grad, const Tensor& dy, const Tensor& xhat, const Tensor& rstd, const Tensor& gamma, const Tensor& dgamma,
            const Tensor& dbeta, const Tensor& dx);

}  // namespace mesa::kernels
