// xhat = (x - mean(x)) / sqrt(var(x) + eps), y = gamma xhat + beta.
#include "mesa/kernels/norm.h"
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
  Rows<X> x;
  Rows<Y> y;
  Y* xhat;  // rows of `width`, or null
  A* rstd;  // or null
  const A *gamma, *beta;
  int64_t width;
  A eps;

  template <class Team>
  __device__ void operator()(Team team, int64_t row) const {
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
      if (xhat) store_pack(xhat + row * width + c, h);
      store_pack(row_at(y, row) + c, out);
    });
  }
};

template <class H, class Y>
struct AffineRow {
  using A = Acc<H>;
  Rows<H> xhat;
  Rows<Y> y;
  const A *gamma, *beta;
  int64_t width;

  template <class Team>
  __device__ void operator()(Team team, int64_t row) const {
    constexpr int V = Team::kVector;
    Values<Team, H> values(row_at(xhat, row), width);
    team.each(width, [&](int p, auto c) {
      const A(&h)[V] = values.at(p, c);
      A g[V], b[V], out[V];
      load_parameters(gamma + c, g);
      load_parameters(beta + c, b);
#pragma unroll
      for (int i = 0; i < V; ++i) out[i] = affine_of(h[i], g[i], b[i]);
      store_pack(row_at(y, row) + c, out);
    });
  }
};

}  // namespace

void layer_norm(const Tensor& x, const Tensor& gamma, const Tensor& beta, double eps, const Tensor& y, const Tensor& xhat,
                const Tensor& rstd) {
  const int64_t width = width_of(x);
  check(x.shape() == y.shape(), "layer_norm: tensors of shapes ", x.shape(), " and ", y.shape());
  check_parameter(gamma, width, "gamma");
  check_parameter(beta, width, "beta");
  if (xhat.defined()) check_alike(xhat, y, "layer_norm: xhat");
  if (rstd.defined()) check(rstd.is_contiguous() && rstd.numel() == x.rows(), "layer_norm: rstd has ", rstd.numel(), " elements");
  dispatch(x.dtype(), y.dtype(), [&](auto tx, auto ty) {
    using X = decltype(tx);
    using Y = decltype(ty);
    using A = Acc<X>;
    constexpr int V = kVectorOf<X, Y>;
    const NormRow<X, Y> norm{rows_of<X>(x),
                             rows_of<Y>(y),
                             xhat.defined() ? xhat.data<Y>() : nullptr,
                             rstd.defined() ? rstd.data<A>() : nullptr,
                             gamma.data<A>(),
                             beta.data<A>(),
                             width,
                             static_cast<A>(eps)};
    const bool vectors =
        in_vectors<V>(width, norm.x, norm.y) && in_vectors<V>(norm.xhat, width, width) && aligned(norm.gamma, 16) && aligned(norm.beta, 16);
    launch_rows<V>("layer_norm", x.rows(), width, vectors, norm);
  });
}

void affine(const Tensor& xhat, const Tensor& gamma, const Tensor& beta, const Tensor& y) {
  const int64_t width = width_of(xhat);
  check(xhat.shape() == y.shape(), "affine: tensors of shapes ", xhat.shape(), " and ", y.shape());
  check_parameter(gamma, width, "gamma");
  check_parameter(beta, width, "beta");
  dispatch(xhat.dtype(), y.dtype(), [&](auto th, auto ty) {
    using H = decltype(th);
    using Y = decltype(ty);
    using A = Acc<H>;
    constexpr int V = kVectorOf<H, Y>;
    const AffineRow<H, Y> rows{rows_of<H>(xhat), rows_of<Y>(y), gamma.data<A>(), beta.data<A>(), width};
    const bool vectors = in_vectors<V>(width, rows.xhat, rows.y) && aligned(rows.gamma, 16) && aligned(rows.beta, 16);
    launch_rows<V>("affine", xhat.rows(), width, vectors, rows);
  });
}

}  // namespace mesa::kernels::cuda
