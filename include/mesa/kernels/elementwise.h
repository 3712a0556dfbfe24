// Pointwise arithmetic and its gradients. Floating dtypes; results are rounded to the output's dtype, sums run in fp32 (fp64 for fp64).
#pragma once
#include <algorithm>

#include "mesa/base/random.h"
#include "mesa/kernels/codec.h"

namespace mesa::kernels {

// Unless said otherwise tensors are contiguous and of one shape; an output may be the same tensor as an input.

/// y <- value.
MESA_KERNEL(fill, const Tensor& y, double value);
/// y <- x with conversion between floating dtypes; x and y may have any strides.
MESA_KERNEL(copy, const Tensor& x, const Tensor& y);
/// y <- a + b. The three dtypes may differ (f32 residual + bf16 branch).
MESA_KERNEL(add, const Tensor& a, const Tensor& b, const Tensor& y);
MESA_KERNEL(mul, const Tensor& a, const Tensor& b, const Tensor& y);
/// y <- s x.
MESA_KERNEL(scale, const Tensor& x, double s, const Tensor& y);
/// y[r, c] <- s[r] x[r, c] for rows of x's last axis, few long ones or many short ones; s [rows] f32 (f64 for f64).
MESA_KERNEL(scale_rows, const Tensor& x, const Tensor& s, const Tensor& y);
/// y[m, n] <- a[m, n] + b[n], where n runs over b's elements and m over the rest (bias, position embedding). a, y one shape; b's numel
/// divides it.
MESA_KERNEL(add_rows, const Tensor& a, const Tensor& b, const Tensor& y);
/// db[n] <- (accumulate ? db[n] : 0) + sum_m dy[m, n], in a fixed order (deterministic for a given thread count is not enough: the same
/// for every thread count). db is f32 or f64.
MESA_KERNEL(sum_rows, const Tensor& dy, const Tensor& db, bool accumulate);

/// y <- max(x, 0).
MESA_KERNEL(relu, const Tensor& x, const Tensor& y);
/// The same, and one bit for each element: whether x lets a gradient pass, !(x <= 0), so that a NaN does (as in PyTorch). Element e is bit
/// e % 8 of byte e / 8 of mask, u8 [(n + 7) / 8]; bits beyond the last element are 0.
MESA_KERNEL(relu_mask, const Tensor& x, const Tensor& y, const Tensor& mask);
/// y <- x where the element's bit is 1, else 0; y may be x.
MESA_KERNEL(apply_mask, const Tensor& x, const Tensor& mask, const Tensor& y);
/// y <- x Phi(x), exact erf form (Hendrycks and Gimpel, 2016).
MESA_KERNEL(gelu, const Tensor& x, const Tensor& y);
/// The same with codes of x: bit for bit those that encode makes. CUDA.
MESA_KERNEL(gelu_codes, const Tensor& x, const Tensor& y, const Coding& of_x);
/// dx <- dy (Phi(x) + x phi(x)), and y as gelu has it, which needs the same exponential; an undefined y is not written. y has x's or dx's
/// dtype.
MESA_KERNEL(gelu_grad, const Tensor& dy, const Tensor& x, const Tensor& dx, const Tensor& y);
/// Both from codes of x, bit for bit as from the decoded tensor, which has the result's dtype. CUDA.
MESA_KERNEL(gelu_coded, const Coded& x, const Tensor& y);
MESA_KERNEL(gelu_grad_coded, const Tensor& dy, const Coded& x, const Tensor& dx, const Tensor& y);
/// Each of these gradients with sums of its columns from the same visit, for a bias in front of gelu: sums [parts, last axis] f32 gets rows
/// that add up to the sum of dx's rows, as dx holds them. Not f64. CUDA.
MESA_KERNEL(gelu_grad_sums, const Tensor& dy, const Tensor& x, const Tensor& dx, const Tensor& y, const Tensor& sums);
MESA_KERNEL(gelu_grad_coded_sums, const Tensor& dy, const Coded& x, const Tensor& dx, const Tensor& y, const Tensor& sums);
/// How threads of 8 columns each lie over a matrix: `wide` by `high` in a block of at most 256, `tiles` blocks side by side.
struct ColumnBlocks {
  int64_t tiles, wide, high;
  explicit ColumnBlocks(int64_t columns) {
    const int64_t threads = std::max<int64_t>(1, columns / 8);
    tiles = (threads + 255) / 256, wide = (threads + tiles - 1) / tiles, high = 256 / wide;
  }
};
/// Parts for sums of such a matrix: one for each row of threads that 132 multiprocessors hold at once, 32 warps each, so that no block
/// comes late; and 8 rows of the matrix a part at least.
inline int64_t sum_parts(int64_t rows, int64_t columns) {
  const ColumnBlocks block(columns);
  const int64_t warps = (block.wide * block.high + 31) / 32, blocks = 132 * (32 / warps) / block.tiles;
  return std::clamp<int64_t>(rows / 8, 1, block.high * std::max<int64_t>(1, blocks));
}

/// y[i] <- keep_i ? x[i] / (1 - p) : 0 with keep_i = uniform(random_word(key, i)) >= p. The gradient is the same call on dy.
MESA_KERNEL(dropout, const Tensor& x, const Tensor& y, double p, RandomKey key);
/// y <- x + factors[b] branch for each index b of axis 0, where factors[b] <- uniform(random_word(key, b)) >= p ? 1 / (1 - p) : 0:
/// stochastic depth (Huang et al., 2016). branch may have another dtype; y has x's, and may be either; factors [dim 0] f32 (f64 for f64),
/// not written where x is empty. 0 times NaN or infinity is NaN.
MESA_KERNEL(add_drop_path, const Tensor& x, const Tensor& branch, double p, RandomKey key, const Tensor& y, const Tensor& factors);

/// result [1] f64, where the tensors live, <- the sum of squares of all elements of `xs`, in double, in a fixed order.
MESA_KERNEL(sum_squares, const std::vector<Tensor>& xs, const Tensor& result);
/// counts[1] (see mesa/kernels/codec.h) += the number of NaN and infinite elements.
MESA_KERNEL(count_nonfinite, const Tensor& x, const Tensor& counts);
/// *result (host memory) <- index of the first NaN or infinity, or -1. Waits for the device: for finding a culprit.
MESA_KERNEL(first_nonfinite, const Tensor& x, int64_t* result);

}  // namespace mesa::kernels
