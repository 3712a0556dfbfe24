// xhat = (x - mean(x)) / sqrt(var(x) + eps), y = gamma xhat + beta.
#include "mesa/kernels/norm.h"
#include "norm_row.h"

namespace mesa::kernels::cuda {

namespace {

template <class H, class Y>
struct AffineRow {
  using A = Acc<H>;
  static constexpr bool kOften = std::is_same_v<H, Y>;
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
  dispatch(x.dtype(), y.dtype(), [&](auto tx, auto ty) {
    using X = decltype(tx);
    using Y = decltype(ty);
    const NormRow<X, Y> norm(x, gamma, beta, eps, y, xhat, rstd);
    launch_rows<kVectorOf<X, Y>>("layer_norm", x.rows(), norm.width, norm.in_vectors(), norm);
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
