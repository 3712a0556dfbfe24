// Layer normalization over the last axis (Ba et al., 2016), and softmax.
#pragma once
#include <algorithm>

#include "mesa/kernels/codec.h"

namespace mesa::kernels {

/// x [.., C] -> xhat = (x - mean) rstd [.., C], y = gamma xhat + beta [.., C], rstd [rows] (f32, or f64 for f64).
/// x f32|bf16|f64; y and xhat share a dtype (x's, or bf16 for f32 x); gamma, beta [C] f32 (f64 for f64). Variance is biased, two-pass.
/// An undefined xhat or rstd is not written.
MESA_KERNEL(layer_norm, const Tensor& x, const Tensor& gamma, const Tensor& beta, double eps, const Tensor& y, const Tensor& xhat,
            const Tensor& rstd);
/// The same with codes of what would be xhat: bit for bit those that encode makes of it. CUDA.
MESA_KERNEL(layer_norm_codes, const Tensor& x, const Tensor& gamma, const Tensor& beta, double eps, const Tensor& y, const Tensor& rstd,
            const Coding& xhat);
/// y[.., c] <- gamma[c] xhat[.., c] + beta[c], bit for bit what layer_norm wrote for f32 and f64.
MESA_KERNEL(affine, const Tensor& xhat, const Tensor& gamma, const Tensor& beta, const Tensor& y);
/// The same from codes of xhat, bit for bit as from the decoded tensor, which has y's dtype. CUDA.
MESA_KERNEL(affine_coded, const Coded& xhat, const Tensor& gamma, const Tensor& beta, const Tensor& y);
/// Where the gradients of layer norm go, [.., C] and [C]; what is undefined is not computed, but for dx.
struct LayerNormGrads {
  Tensor dx = {};            ///< in x's dtype
  bool add_x = false;        ///< to what dx holds
  Tensor dx_copy = {};       ///< receives what dx then holds in bf16, too
  Tensor copy_factors = {};  ///< for each sample, by what its rows of dx_copy are multiplied: [S], S divides the rows; in gamma's dtype
  Tensor dx_sums = {};  ///< [layer_norm_grad_parts, C], in gamma's dtype: receives rows that add up to the sum of dx's, or of dx_copy's
                        ///< if that is defined, before they are rounded. CUDA
  Tensor y = {};        ///< receives gamma xhat + beta, bit for bit as affine writes it, in xhat's dtype; may be dy
  Tensor dgamma = {}, dbeta = {};  ///< f32 or f64
  bool add_gamma = false, add_beta = false;
};
/// Chunks of the rows that a GPU makes these gradients in: as many as 132 multiprocessors hold blocks at once, and a row for each of a
/// block's warps. Those of wide rows are fewer, as each lane holds more of a row; beyond 1,024 columns a block works on one row at a time.
inline int64_t layer_norm_grad_parts(int64_t rows, int64_t width) {
  const int64_t of_a_lane = width > 1024 ? 0 : (width + 31) / 32, warps = of_a_lane <= 12 ? 8 : 4;
  return std::min<int64_t>(132 * (of_a_lane <= 4 ? 4 : of_a_lane <= 8 ? 3 : 2), (rows + warps - 1) / warps);
}
/// dx += rstd (g - mean(g) - xhat mean(g xhat)) with g = gamma dy; dgamma[c] += sum dy xhat, dbeta[c] += sum dy (= when not added).
/// Sums are in an order that does not depend on the thread count.
MESA_KERNEL(layer_norm_grad, const Tensor& dy, const Tensor& xhat, const Tensor& rstd, const Tensor& gamma, const Tensor& beta,
            const LayerNormGrads& to);
/// The same from codes of xhat, bit for bit as from the decoded tensor, which has dy's dtype. CUDA.
MESA_KERNEL(layer_norm_grad_coded, const Tensor& dy, const Coded& xhat, const Tensor& rstd, const Tensor& gamma, const Tensor& beta,
            const LayerNormGrads& to);

/// y[.., j] <- exp(x_j - max) / sum, over the last axis.
MESA_KERNEL(softmax, const Tensor& x, const Tensor& y);
/// dx <- y (dy - sum_j y_j dy_j).
MESA_KERNEL(softmax_grad, const Tensor& dy, const Tensor& y, const Tensor& dx);

/// Rows of attention scores s [rows, N] (f32|f64, raw q.k): p <- softmax(scale s) in p's dtype, lse[row] <- log sum_j exp(scale s_j).
/// p may be s itself when the dtypes agree. lse is contiguous.
MESA_KERNEL(attention_softmax, const Tensor& s, double scale, const Tensor& p, const Tensor& lse);
/// p <- exp(scale s - lse[row]): the probabilities again from a saved log-sum-exp.
MESA_KERNEL(attention_probabilities, const Tensor& s, double scale, const Tensor& lse, const Tensor& p);
/// ds <- scale p (dp - delta[row]) in ds's dtype. An undefined delta means sum_j p_j dp_j, computed here. p, dp f32|f64.
MESA_KERNEL(attention_softmax_grad, const Tensor& dp, const Tensor& p, const Tensor& delta, double scale, const Tensor& ds);
/// delta[b, h, n] <- sum_d d_o[b, n, h d] o[b, n, h d]; o, d_o [B, N, C] uniform rows, delta [B, H, N] contiguous f32|f64.
MESA_KERNEL(attention_delta, const Tensor& d_o, const Tensor& o, const Tensor& delta);

}  // namespace mesa::kernels
