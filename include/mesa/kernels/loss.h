// Losses of classification, and what they compare logits with.
#pragma once
#include "mesa/kernels/kernel.h"
#include "mesa/tensor/mixing.h"

namespace mesa::kernels {

/// Rows of logits [B, K] (f32|f64) against integer labels [B] (i64, checked by the caller) with label smoothing s:
/// loss[b] = -sum_k t_k log softmax(logits)_k, t = (1-s) onehot + s/K  (Szegedy et al., 2016).
MESA_KERNEL(cross_entropy, const Tensor& logits, const Tensor& labels, double smoothing, const Tensor& loss);
/// The same against soft targets [B, K], each row a distribution.
MESA_KERNEL(cross_entropy_soft, const Tensor& logits, const Tensor& targets, const Tensor& loss);
/// dlogits <- dloss[0] / B (softmax(logits) - t).
MESA_KERNEL(cross_entropy_grad, const Tensor& dloss, const Tensor& logits, const Tensor& labels, double smoothing, const Tensor& dlogits);
MESA_KERNEL(cross_entropy_soft_grad, const Tensor& dloss, const Tensor& logits, const Tensor& targets, const Tensor& dlogits);
/// y[0] <- mean of x (f32|f64), in double.
MESA_KERNEL(mean_all, const Tensor& x, const Tensor& y);

/// targets[b, k] <- smoothing / K + (1 - smoothing) (share [k = label of b] + (1 - share) [k = label of b's partner]): the labels of mixed
/// samples, f32|f64. An undefined `mixing` mixes nothing. With a `threshold` of 0 or more they are then 1 above it and 0 elsewhere.
MESA_KERNEL(mixed_targets, const Tensor& labels, const Tensor& mixing, double smoothing, double threshold, const Tensor& targets);
/// Rows of logits [B, K] (f32|f64), each class a yes or no of its own, against targets [B, K] in [0, 1]:
/// loss[b] = 1/K sum_k (log(1 + exp x_k) - t_k x_k), without overflow.
MESA_KERNEL(binary_cross_entropy, const Tensor& logits, const Tensor& targets, const Tensor& loss);
/// dlogits <- dloss[0] / (B K) (1 / (1 + exp(-x)) - t).
MESA_KERNEL(binary_cross_entropy_grad, const Tensor& dloss, const Tensor& logits, const Tensor& targets, const Tensor& dlogits);
/// labels[b] <- the first k with the largest x[b, k], or the first that is NaN; x [B, K] f32|f64, labels i64.
MESA_KERNEL(argmax, const Tensor& x, const Tensor& labels);

}  // namespace mesa::kernels
