// What ops share on their way back.
#pragma once
#include "mesa/autograd/tape.h"
#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/matmul.h"

namespace mesa {

/// x itself, or its values in another dtype.
inline Tensor cast(const Tensor& x, DType dtype) {
  if (x.dtype() == dtype) return x;
  const Tensor y = empty_like(x, dtype);
  kernels::copy(x, y);
  return y;
}

/// Writes a gradient to `out`, or adds it to what is there.
inline void put(const Tensor& gradient, const Tensor& out, bool accumulate) {
  if (accumulate)
    kernels::add(out, gradient, out);
  else
    kernels::copy(gradient, out);
}

/// The gradients of w [O, ..] and b [O] of y = x w^T + b from dy [M, O], as Grads holds them. `x` [M, I] is asked for only if w wants one.
/// `sums`: Extras::dy_sums.
inline std::pair<Tensor, Tensor> weight_and_bias_grads(const Target& dw, const Target& db, const Tensor& dy,
                                                       const std::function<Tensor()>& x, const Tensor& sums = {}) {
  // One product computes both; the targets only say where the two go, and whether to add.
  Tensor to_w, to_b;
  bool add_w = false, add_b = false;
  const Tensor w = dw.into([&](const Tensor& to, bool add) { to_w = to, add_w = add; });
  const Tensor b = db.into([&](const Tensor& to, bool add) { to_b = to, add_b = add; });
  if (to_w.defined()) {
    const Tensor rows = x();
    const bool apart = sums.defined() || !to_b.defined();
    kernels::matmul_weight_grad(dy, rows, to_w.reshape({dy.dim(1), rows.dim(1)}), add_w, apart ? Tensor() : to_b, add_b);
    if (!apart) return {w, b};
  }
  if (to_b.defined()) kernels::sum_rows(sums.defined() ? sums : dy, to_b, add_b);
  return {w, b};
}

}  // namespace mesa
