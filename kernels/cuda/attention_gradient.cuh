// What the kernels of the fused attention's backward pass have in common.
#pragma once
#include "attention_window.cuh"

namespace mesa::kernels::cuda {

/// d_table of `windows` <- (+) the gradient of the biases, from the statistics that the kernels for dq leave: lse and delta [B windows, H,
/// n].
void window_bias_grad(const Tensor& d_o, const AttentionOperand& q, const AttentionOperand& k, const AttentionOperand& v, const Tensor& lse,
                      const Tensor& delta, int64_t heads, double scale, const WindowBias& windows);

namespace {

/// A tile each.
inline constexpr int kWarps = 8;

template <class Seen>
struct Problem {
  Extent extent;
  Seen seen;  ///< NoWindows or InWindows
  Operand q, k, v, o, d_o, dq, dk, dv;
  float *lse, *delta;     ///< [B, H, N], or [B windows, H, n]
  float* sums = nullptr;  ///< [B or B windows, parts, 3, C] of the columns of dq, dk and dv: a row for the blocks of all heads; or null
  float scale;
};

/// Without o and the gradients.
template <class Seen>
Problem<Seen> problem_of(const Sizes& n, const Seen& seen, const AttentionOperand& q, const AttentionOperand& k, const AttentionOperand& v,
                         const Tensor& d_o, const Tensor& lse, const Tensor& delta, double scale) {
  Problem<Seen> p;
  p.seen = seen;
  p.q = n.queries(q, "q"), p.k = n.keys(k, "k"), p.v = n.keys(v, "v"), p.d_o = n.queries({d_o, {}}, "d_o");
  p.lse = lse.data<float>(), p.delta = delta.data<float>();
  p.scale = static_cast<float>(scale * kLog2E);
  return p;
}

/// 16 queries; lse in units of log2.
template <int head>
struct Queries {
  uint32_t q[head / 16][4], d_o[head / 16][4];
  float dq[head / 8][4];
  float lse[2], delta[2];  ///< of each half's row
};

}  // namespace
}  // namespace mesa::kernels::cuda
