// xhat = (x - mean(x)) / sqrt(var(x) + eps), y = gamma xhat + beta;
// dx = rstd (g - mean(g) - xhat mean(g xhat)) with g = gamma dy, dgamma = sum dy xhat, dbeta = sum dy; and, where wanted,
// dx once more in bf16 and y again.
#include "mesa/kernels/norm.h"

#include <cmath>

#include "cpu.h"

namespace mesa::kernels::MESA_ISA {

namespace {

template <class A>
A fold(A* lane) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

// The two sums of a row run in kLanes chains whatever the compiler makes of them: one long chain of additions loses digits.

/// sum_c x[c].
template <class X>
Acc<X> sum_of(const X* x, int64_t n) {
  Acc<X> lane[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) lane[l] += load(x + c + l);
  }
  for (int l = 0; c + l < n; ++l) lane[l] += load(x + c + l);
  return fold(lane);
}

/// sum_c (x[c] - mean)^2.
template <class X>
Acc<X> sum_of_squares(const X* x, Acc<X> mean, int64_t n) {
  Acc<X> lane[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) lane[l] += (load(x + c + l) - mean) * (load(x + c + l) - mean);
  }
  for (int l = 0; c + l < n; ++l) lane[l] += (load(x + c + l) - mean) * (load(x + c + l) - mean);
  return fold(lane);
}

template <class X, class Y>
struct NormRows {
  using A = Acc<X>;
  Rows<X> x;
  Rows<Y> y;
  Y* xhat;  // rows of `width`, or null
  A* rstd;  // or null
  const A *gamma, *beta;
  int64_t width;
  double eps;

  void operator()(int64_t row) const {
    const X* px = x[row];
    Y* py = y[row];
    const A mean = sum_of(px, width) / static_cast<A>(width);
    const A scale = A(1) / std::sqrt(sum_of_squares(px, mean, width) / static_cast<A>(width) + static_cast<A>(eps));
    if (rstd) rstd[row] = scale;
    if (xhat) {
      Y* ph = xhat + row * width;
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) {
        const A h = (load(px + c) - mean) * scale;
        store(ph + c, h);
        store(py + c, affine_of(h, gamma[c], beta[c]));
      }
    } else {
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) store(py + c, affine_of((load(px + c) - mean) * scale, gamma[c], beta[c]));
    }
  }
};

constexpr int64_t kGradRows = 64;  // rows a chunk of dgamma and dbeta: short fp32 sums, combined in order in double

/// The means over a row that dx subtracts: of g and of g xhat, g = gamma dy.
template <class A>
struct GradMeans {
  A g, gh;
};
template <class A, class G, class H>
GradMeans<A> grad_means(const G* dy, const H* xhat, const A* gamma, int64_t width) {
  A sum_g = 0, sum_gh = 0;
#pragma omp simd reduction(+ : sum_g, sum_gh)
  for (int64_t c = 0; c < width; ++c) {
    const A g = gamma[c] * load(dy + c);
    sum_g += g;
    sum_gh += g * load(xhat + c);
  }
  return {sum_g / static_cast<A>(width), sum_gh / static_cast<A>(width)};
}

/// dx of R rows, perhaps added to what is there, and their part of dgamma and dbeta, which so travel to memory and back only once for all.
template <int R, bool add, class A, class G, class H, class X>
void grad_rows(const G* dy, const H* xhat, const A* rstd, const A* gamma, X* dx, int64_t width, A* dgamma, A* dbeta) {
  GradMeans<A> mean[R];
  A scale[R];
  for (int r = 0; r < R; ++r) {
    mean[r] = grad_means(dy + r * width, xhat + r * width, gamma, width);
    scale[r] = rstd[r];
  }
#pragma omp simd
  for (int64_t c = 0; c < width; ++c) {
    A to_gamma = 0, to_beta = 0;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const A g = load(dy + r * width + c), h = load(xhat + r * width + c);
      to_gamma += g * h;
      to_beta += g;
      const A d = scale[r] * (gamma[c] * g - mean[r].g - h * mean[r].gh);
      store(dx + r * width + c, add ? load(dx + r * width + c) + d : d);
    }
    dgamma[c] += to_gamma;
    dbeta[c] += to_beta;
  }
}

/// y <- gamma xhat + beta.
template <class A, class H, class Y>
void affine_row(const H* xhat, const A* gamma, const A* beta, Y* y, int64_t width) {
#pragma omp simd
  for (int64_t c = 0; c < width; ++c) store(y + c, affine_of(load(xhat + c), gamma[c], beta[c]));
}

template <class G, class H, class X>
struct NormGrad {
  using A = Acc<X>;
  const G* dy;
  const H* xhat;
  const A *rstd, *gamma;
  X* dx;
  int64_t width;
  A* sums;  // [chunks, 2, width]: dgamma and dbeta of each chunk; null if neither is wanted
  bool add;
  const A* beta;
  H* y;           // gamma xhat + beta; null if not wanted
  bf16* dx_copy;  // or null
  const A* copy_factors;
  int64_t rows_of_factor;

  template <int R>
  void rows(int64_t row, A* dgamma) const {
    const int64_t at = row * width;
    const auto run = add ? &grad_rows<R, true, A, G, H, X> : &grad_rows<R, false, A, G, H, X>;
    run(dy + at, xhat + at, rstd + row, gamma, dx + at, width, dgamma, dgamma + width);
  }
  void chunk(int64_t index, int64_t begin, int64_t end, A* spare) const {
    A* dgamma = sums ? sums + index * 2 * width : spare;
    std::fill(dgamma, dgamma + 2 * width, A(0));
    int64_t row = begin;
    for (; row + 4 <= end; row += 4) rows<4>(row, dgamma);
    for (; row < end; ++row) rows<1>(row, dgamma);
    for (row = begin; y && row < end; ++row) affine_row(xhat + row * width, gamma, beta, y + row * width, width);
    for (row = begin; dx_copy && row < end; ++row) copy_row(row);
  }
  void copy_row(int64_t row) const {
    const A factor = copy_factors ? copy_factors[row / rows_of_factor] : A(1);
#pragma omp simd
    for (int64_t i = row * width; i < (row + 1) * width; ++i) store(dx_copy + i, factor * load(dx + i));
  }
};

}  // namespace

void layer_norm(const Tensor& x, const Tensor& gamma, const Tensor& beta, double eps, const Tensor& y, const Tensor& xhat,
                const Tensor& rstd) {
  const int64_t width = width_of(x);
  check_layer_norm(x, gamma, beta, y, xhat, rstd);
  dispatch(x.dtype(), y.dtype(), [&](auto tx, auto ty) {
    using X = decltype(tx);
    using Y = decltype(ty);
    using A = Acc<X>;
    const NormRows<X, Y> norm{rows_of<X>(x),
                              rows_of<Y>(y),
                              xhat.defined() ? xhat.data<Y>() : nullptr,
                              rstd.defined() ? rstd.data<A>() : nullptr,
                              gamma.data<A>(),
                              beta.data<A>(),
                              width,
                              eps};
    parallel_rows(x.rows(), width, [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) norm(row);
    });
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
    const Rows<H> in = rows_of<H>(xhat);
    const Rows<Y> out = rows_of<Y>(y);
    const A *pg = gamma.data<A>(), *pb = beta.data<A>();
    parallel_rows(xhat.rows(), width, [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) affine_row(in[row], pg, pb, out[row], width);
    });
  });
}

void layer_norm_grad(const Tensor& dy, const Tensor& xhat, const Tensor& rstd, const Tensor& gamma, const Tensor& beta,
                     const LayerNormGrads& to) {
  const int64_t width = width_of(dy), rows = dy.rows(), chunks = (rows + kGradRows - 1) / kGradRows;
  check_layer_norm_grad(dy, rstd, gamma, beta, to, xhat.dtype());
  check(!to.dx_sums.defined(), "layer_norm_grad sums the columns of dx on a GPU alone");
  check_alike(dy, xhat, "layer_norm_grad: xhat");
  dispatch(dy.dtype(), xhat.dtype(), to.dx.dtype(), [&](auto tg, auto th, auto tx) {
    using G = decltype(tg);
    using H = decltype(th);
    using X = decltype(tx);
    using A = Acc<X>;
    const Tensor partial = to.dgamma.defined() || to.dbeta.defined() ? Tensor::empty({chunks, 2, width}, dtype_of<A>) : Tensor();
    A* sums = partial.defined() ? partial.data<A>() : nullptr;
    const NormGrad<G, H, X> grad{dy.data<G>(),
                                 xhat.data<H>(),
                                 rstd.data<A>(),
                                 gamma.data<A>(),
                                 to.dx.data<X>(),
                                 width,
                                 sums,
                                 to.add_x,
                                 to.y.defined() ? beta.data<A>() : nullptr,
                                 to.y.defined() ? to.y.data<H>() : nullptr,
                                 to.dx_copy.defined() ? to.dx_copy.data<bf16>() : nullptr,
                                 to.copy_factors.defined() ? to.copy_factors.data<A>() : nullptr,
                                 to.copy_factors.defined() ? rows / to.copy_factors.numel() : 1};
    parallel_rows(chunks, kGradRows * width, [&](int64_t first, int64_t last) {
      std::vector<A> spare(sums ? 0 : 2 * width);
      for (int64_t c = first; c < last; ++c) grad.chunk(c, c * kGradRows, std::min(rows, (c + 1) * kGradRows), spare.data());
    });
    const auto finish = [&](const Tensor& out, int64_t which, bool accumulate) {
      if (!out.defined()) return;
      dispatch_wide(out.dtype(),
                    [&](auto t) { add_partials(sums + which * width, chunks, 2 * width, width, out.data<decltype(t)>(), accumulate); });
    };
    finish(to.dgamma, 0, to.add_gamma);
    finish(to.dbeta, 1, to.add_beta);
  });
}

}  // namespace mesa::kernels::MESA_ISA
