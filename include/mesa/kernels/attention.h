// Softmax attention for all heads at once, by rows of scores that are never kept.
#pragma once
#include "mesa/kernels/kernel.h"

namespace mesa::kernels {

/// o <- softmax(scale q k^T) v; lse [B, H, N] <- log of each row's sum (f32, f64 for f64). q, k, v, o [B, H, N, D], any strides with unit last.
void attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale, const Tensor& o, const Tensor& lse);

/// dq, dk, dv from the gradient d_o of o, both [B, N, H D]. With o and lse (exact storage) the probabilities are exp(scale q k^T - lse) and
/// delta = sum_d dO O; without them (undefined) rows are normalized again and delta = sum_j P dP, so that all of it comes from one source.
void attention_grad(const Tensor& d_o, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& lse, double scale,
                    const Tensor& dq, const Tensor& dk, const Tensor& dv);

}  // namespace mesa::kernels
