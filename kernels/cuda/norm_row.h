// One row of layer norm, xhat = (x - mean(x)) / sqrt(var(x) + eps), y = gamma xhat + beta, whatever becomes of xhat.
#pragma once
#include "rows.h"

namespace mesa::kernels::cuda {
namespace {

/// gamma xhat + beta, one spelling for layer_norm and affine: one instruction, whatever stands around it.
template <class A>
__device__ inline A affine_of(A xhat, A gamma, A beta) {
  return std::fma(gamma, xhat, beta);
}

template <class X, class Y>
struct NormRow {
  using A = Acc<X>;
  static constexpr bool kOften = sizeof(X) >= sizeof(Y);
  Rows<X> x;
  Rows<Y> y;
  Y* xhat;  // rows of `width`, or null
  A* rstd;  // or null
  const A *gamma, *beta;
  int64_t width;
  A eps;

  /// Checks the tensors; xhat and rstd may be undefined.
  NormRow(const Tensor& tx, const Tensor& tgamma, const Tensor& tbeta, double eps, const Tensor& ty, const Tensor& txhat,
          const Tensor& trstd)
      : x(rows_of<X>(tx)),
        y(rows_of<Y>(ty)),
        xhat(txhat.defined() ? txhat.data<Y>() : nullptr),
        rstd(trstd.defined() ? trstd.data<A>() : nullptr),
        gamma(tgamma.data<A>()),
        beta(tbeta.data<A>()),
        width(width_of(tx)),
        eps(static_cast<A>(eps)) {
    check_layer_norm(tx, tgamma, tbeta, ty, txhat, trstd);
  }
  /// True if rows can be read and written in pieces of kVectorOf<X, Y>.
  bool in_vectors() const {
    constexpr int V = kVectorOf<X, Y>;
    return cuda::in_vectors<V>(width, x, y) && cuda::in_vectors<V>(xhat, width, width) && aligned(gamma, 16) && aligned(beta, 16);
  }

  /// keep(row, p, c, xhat) is called for each piece.
  template <class Team, class Keep>
  __device__ void operator()(Team team, int64_t row, Keep&& keep) const {
    constexpr int V = Team::kVector;
    Values<Team, X> values(row_at(x, row), width);
    A sum = 0, squares = 0;
    team.each(width, [&](int p, auto c) {
      const A(&v)[V] = values.at(p, c);
#pragma unroll
      for (int i = 0; i < V; ++i) sum += v[i];
    });
    const A mean = team.sum(sum) / static_cast<A>(width);
    team.each(width, [&](int p, auto c) {
      const A(&v)[V] = values.at(p, c);
#pragma unroll
      for (int i = 0; i < V; ++i) squares += (v[i] - mean) * (v[i] - mean);
    });
    const A scale = A(1) / std::sqrt(team.sum(squares) / static_cast<A>(width) + eps);
    if (rstd && team.leads()) rstd[row] = scale;
    team.each(width, [&](int p, auto c) {
      const A(&v)[V] = values.at(p, c);
      A g[V], b[V], h[V], out[V];
      load_parameters(gamma + c, g);
      load_parameters(beta + c, b);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        h[i] = (v[i] - mean) * scale;
        out[i] = affine_of(h[i], g[i], b[i]);
      }
      keep(row, p, c, h);
      store_pack(row_at(y, row) + c, out);
    });
  }
  template <class Team>
  __device__ void operator()(Team team, int64_t row) const {
    (*this)(team, row, [this](int64_t at, int, auto c, const A(&h)[Team::kVector]) {
      if (xhat) store_pack(xhat + at * width + c, h);
    });
  }
};

}  // namespace
}  // namespace mesa::kernels::cuda
