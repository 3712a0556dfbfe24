// mean = sum x / n, var = sum (x - mean)^2 / n over the rows of each channel; xhat = (x - mean) / sqrt(var + eps), y = gamma xhat + beta;
// dgamma = sum dy xhat, dbeta = sum dy, dx = gamma rstd (dy - dbeta / n - xhat dgamma / n).
#include "mesa/kernels/batch_norm_common.h"

#include <cmath>

#include "cpu.h"

namespace mesa::kernels::MESA_ISA {
namespace {

/// Rows of a chunk: few enough to stay in a core's cache for a second look, whatever the thread count.
int64_t chunk_rows(int64_t width) { return std::clamp<int64_t>(16384 / std::max<int64_t>(width, 1), 16, 1024); }

/// The sums of a chunk's rows in lanes of a few rows each: short f32 sums keep their digits.
constexpr int64_t kLaneRows = 64;

/// mean[c] of the rows, and squares[c] <- the sum of (x - mean)^2 of them.
template <class X, class A>
void chunk_statistics(const X* x, int64_t rows, int64_t width, A* mean, A* squares, A* lane) {
  const auto sum = [&](A* to, const auto& term) {
    std::fill(to, to + width, A(0));
    for (int64_t from = 0; from < rows; from += kLaneRows) {
      std::fill(lane, lane + width, A(0));
      for (int64_t row = from; row < std::min(rows, from + kLaneRows); ++row) {
        const X* px = x + row * width;
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) lane[c] += term(load(px + c), c);
      }
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) to[c] += lane[c];
    }
  };
  sum(mean, [](A v, int64_t) { return v; });
  const A share = A(1) / static_cast<A>(rows);
#pragma omp simd
  for (int64_t c = 0; c < width; ++c) mean[c] *= share;
  sum(squares, [mean](A v, int64_t c) { return (v - mean[c]) * (v - mean[c]); });
}

/// The whole from the chunks (Chan, Golub and LeVeque, 1979), in double: squares = sum of the chunks' and of n_k (mean_k - mean)^2.
struct Combined {
  double mean = 0, squares = 0;
};
template <class A>
Combined combine(const A* partial, int64_t chunks, int64_t size, int64_t rows, int64_t width, int64_t c) {
  const auto count = [=](int64_t k) { return static_cast<double>(std::min(size, rows - k * size)); };
  Combined all;
  for (int64_t k = 0; k < chunks; ++k) all.mean += count(k) * partial[2 * k * width + c];
  all.mean /= static_cast<double>(rows);
  for (int64_t k = 0; k < chunks; ++k) {
    const double apart = partial[2 * k * width + c] - all.mean;
    all.squares += partial[(2 * k + 1) * width + c] + count(k) * apart * apart;
  }
  return all;
}

}  // namespace

void batch_statistics(const Tensor& x, double eps, double momentum, const Tensor& mean, const Tensor& rstd, const Tensor& running_mean,
                      const Tensor& running_var) {
  const int64_t width = width_of(x), rows = x.rows(), size = chunk_rows(width), chunks = (rows + size - 1) / size;
  check_batch_statistics(x, mean, rstd, running_mean, running_var);
  dispatch(x.dtype(), x.dtype(), [&](auto tx, auto) {
    using X = decltype(tx);
    using A = Acc<X>;
    const Tensor partial = Tensor::empty({chunks, 2, width}, dtype_of<A>);
    const X* px = x.data<X>();
    A* sums = partial.data<A>();
    parallel_rows(chunks, size * width, [=](int64_t first, int64_t last) {
      std::vector<A> lane(width);
      for (int64_t k = first; k < last; ++k)
        chunk_statistics(px + k * size * width, std::min(size, rows - k * size), width, sums + 2 * k * width, sums + (2 * k + 1) * width,
                         lane.data());
    });
    A *pm = mean.data<A>(), *pr = rstd.data<A>();
    A *run_m = running_mean.defined() ? running_mean.data<A>() : nullptr, *run_v = run_m ? running_var.data<A>() : nullptr;
    parallel_rows(width, 2 * chunks, [=](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const Combined all = combine(sums, chunks, size, rows, width, c);
        pm[c] = static_cast<A>(all.mean);
        pr[c] = static_cast<A>(1 / std::sqrt(all.squares / static_cast<double>(rows) + eps));
        if (run_m == nullptr) continue;
        run_m[c] = static_cast<A>(run_m[c] + momentum * (all.mean - run_m[c]));
        run_v[c] = static_cast<A>(run_v[c] + momentum * (all.squares / static_cast<double>(rows - 1) - run_v[c]));
      }
    });
  });
}

void inverse_deviation(const Tensor& var, double eps, const Tensor& rstd) {
  check_alike(var, rstd, "inverse_deviation");
  dispatch_wide(var.dtype(), [&](auto tag) {
    using A = decltype(tag);
    for (int64_t c = 0; c < var.numel(); ++c) rstd.data<A>()[c] = static_cast<A>(1 / std::sqrt(var.data<A>()[c] + eps));
  });
}

void batch_norm(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& gamma, const Tensor& beta, const Tensor& y,
                const Tensor& xhat) {
  const int64_t width = width_of(x);
  check_batch_norm(x, mean, rstd, gamma, beta, y, xhat);
  dispatch(x.dtype(), y.dtype(), [&](auto tx, auto ty) {
    using X = decltype(tx);
    using Y = decltype(ty);
    using A = Acc<X>;
    const X* px = x.data<X>();
    Y *py = y.data<Y>(), *ph = xhat.defined() ? xhat.data<Y>() : nullptr;
    const A *pm = mean.data<A>(), *pr = rstd.data<A>(), *pg = gamma.data<A>(), *pb = beta.data<A>();
    parallel_rows(x.rows(), width, [=](int64_t begin, int64_t end) {
      for (int64_t at = begin * width; at < end * width; at += width) {
        if (ph) {
#pragma omp simd
          for (int64_t c = 0; c < width; ++c) {
            const A h = (load(px + at + c) - pm[c]) * pr[c];
            store(ph + at + c, h);
            store(py + at + c, affine_of(h, pg[c], pb[c]));
          }
        } else {
#pragma omp simd
          for (int64_t c = 0; c < width; ++c) store(py + at + c, affine_of((load(px + at + c) - pm[c]) * pr[c], pg[c], pb[c]));
        }
      }
    });
  });
}

void batch_norm_sums(const Tensor& dy, const Tensor& xhat, const Tensor& dgamma, const Tensor& dbeta) {
  const int64_t width = width_of(dy), rows = dy.rows(), size = kLaneRows, chunks = (rows + size - 1) / size;
  check_batch_norm_sums(dy, xhat, dgamma, dbeta);
  dispatch(dy.dtype(), xhat.dtype(), [&](auto tg, auto th) {
    using G = decltype(tg);
    using H = decltype(th);
    using A = Acc<G>;
    const Tensor partial = Tensor::empty({chunks, 2, width}, dtype_of<A>);
    const G* pg = dy.data<G>();
    const H* ph = xhat.data<H>();
    A* sums = partial.data<A>();
    parallel_chunks(rows, size, width, [=](int64_t k, int64_t begin, int64_t end) {
      A *to_gamma = sums + 2 * k * width, *to_beta = to_gamma + width;
      std::fill(to_gamma, to_gamma + 2 * width, A(0));
      for (int64_t at = begin * width; at < end * width; at += width) {
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) {
          const A g = load(pg + at + c);
          to_gamma[c] += g * load(ph + at + c);
          to_beta[c] += g;
        }
      }
    });
    add_partials(sums, chunks, 2 * width, width, dgamma.data<A>(), false);
    add_partials(sums + width, chunks, 2 * width, width, dbeta.data<A>(), false);
  });
}

void batch_norm_grad(const Tensor& dy, const Tensor& xhat, const Tensor& rstd, const Tensor& gamma, const Tensor& dgamma,
                     const Tensor& dbeta, const Tensor& dx) {
  const int64_t width = width_of(dy), rows = dy.rows();
  check_batch_norm_grad(dy, xhat, rstd, gamma, dgamma, dbeta, dx);
  dispatch(dy.dtype(), xhat.dtype(), dx.dtype(), [&](auto tg, auto th, auto tx) {
    using G = decltype(tg);
    using H = decltype(th);
    using X = decltype(tx);
    using A = Acc<X>;
    std::vector<A> factors(3 * width);  // dx = scale dy - shift - slope xhat
    A *scale = factors.data(), *shift = scale + width, *slope = shift + width;
    for (int64_t c = 0; c < width; ++c) {
      scale[c] = gamma.data<A>()[c] * rstd.data<A>()[c];
      shift[c] = scale[c] * dbeta.data<A>()[c] / static_cast<A>(rows);
      slope[c] = scale[c] * dgamma.data<A>()[c] / static_cast<A>(rows);
    }
    const G* pg = dy.data<G>();
    const H* ph = xhat.data<H>();
    X* out = dx.data<X>();
    parallel_rows(rows, width, [=](int64_t begin, int64_t end) {
      for (int64_t at = begin * width; at < end * width; at += width) {
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) store(out + at + c, scale[c] * load(pg + at + c) - shift[c] - slope[c] * load(ph + at + c));
      }
    });
  });
}

}  // namespace mesa::kernels::MESA_ISA
