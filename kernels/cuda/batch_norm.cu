// mean = sum x / n, var = sum (x - mean)^2 / n over the rows of each channel; xhat = (x - mean) / sqrt(var + eps), y = gamma xhat + beta;
// dgamma = sum dy xhat, dbeta = sum dy, dx = gamma rstd (dy - dbeta / n - xhat dgamma / n).
#include "column_sums.h"
#include "mesa/kernels/batch_norm_common.h"
#include "norm_row.h"
#include "pointwise.h"

namespace mesa::kernels::cuda {
namespace {

/// Rows of a block's tile: so many that there are at most 512 chunks, which one block for a few columns can still add up.
int64_t chunk_rows(int64_t rows) { return std::max<int64_t>(64, ceil_div(ceil_div(rows, 512), 16) * 16); }
int64_t chunks_of(int64_t rows) { return ceil_div(rows, chunk_rows(rows)); }

/// Sums over the rows of one tile of columns: thread t < kColumns gets term(row, column) of its column for two terms at once. A lane adds
/// runs of a few rows each, so that f32 sums stay short, then the lanes' sums are added in order. All threads of the block must call it.
template <int N, class A, class F>
__device__ inline void sum_tile(int64_t rows, int64_t width, int64_t begin, A& first, A& second, const F& term) {
  using Tile = ColumnTile<N>;
  __shared__ Pack<A, N> parts[2][Tile::kRows][Tile::kAcross];
  const int column = threadIdx.x % Tile::kAcross, lane = threadIdx.x / Tile::kAcross;
  Pack<A, N> sums[2]{};
  if (begin + column * N < width)
#pragma unroll 4
    for (int64_t row = lane; row < rows; row += Tile::kRows) term(row, begin + column * N, sums[0].v, sums[1].v);
  __syncthreads();  // a previous call may still be read
  parts[0][lane][column] = sums[0];
  parts[1][lane][column] = sums[1];
  __syncthreads();
  first = second = 0;
  if (threadIdx.x < Tile::kColumns)
    for (int l = 0; l < Tile::kRows; ++l) {
      first += parts[0][l][threadIdx.x / N].v[threadIdx.x % N];
      second += parts[1][l][threadIdx.x / N].v[threadIdx.x % N];
    }
}

/// partial[chunk, 0, c] <- the mean of the chunk's rows, partial[chunk, 1, c] <- their sum of (x - mean)^2: in one pass over distances from
/// the first row, sum (x - x_0)^2 - n (mean - x_0)^2, which loses few digits, since x_0 is one of the values.
template <int N, class X>
__global__ void chunk_statistics_kernel(int64_t rows, int64_t width, int64_t chunk_rows, const X* x, Acc<X>* partial) {
  using A = Acc<X>;
  using Tile = ColumnTile<N>;
  const int64_t tiles = (width + Tile::kColumns - 1) / Tile::kColumns;
  const int64_t chunk = blockIdx.x / tiles, begin = blockIdx.x % tiles * Tile::kColumns, from = chunk * chunk_rows;
  const int64_t count = rows - from < chunk_rows ? rows - from : chunk_rows, own = begin + threadIdx.x % Tile::kAcross * N;
  const X* tile = x + from * width;
  const auto first = own < width ? elements_at<N>(tile + own) : Elements<A, N>{};
  A sum, squares;
  sum_tile<N>(count, width, begin, sum, squares, [=](int64_t row, int64_t c, A(&of_distances)[N], A(&of_squares)[N]) {
    const auto v = elements_at<N>(tile + row * width + c);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const A distance = v.v[k] - first.v[k];
      of_distances[k] += distance;
      of_squares[k] += distance * distance;
    }
  });
  const int64_t c = begin + threadIdx.x;
  if (threadIdx.x >= Tile::kColumns || c >= width) return;
  const A distance = sum / static_cast<A>(count), apart = squares - sum * distance;
  partial[2 * chunk * width + c] = load(tile + c) + distance;
  partial[(2 * chunk + 1) * width + c] = apart < 0 ? A(0) : apart;  // NaN stays
}

/// The whole from the chunks, in double and by distances d_k of their means from the first one's, so that a large mean cancels nothing:
/// mean = mean_0 + sum_k n_k d_k / n, sum (x - mean)^2 = sum_k (squares_k + n_k d_k^2) - n (mean - mean_0)^2.
template <class A>
__global__ void combine_kernel(int64_t rows, int64_t width, int64_t chunk_rows, int64_t chunks, const A* partial, double eps,
                               double momentum, A* mean, A* rstd, A* running_mean, A* running_var) {
  const int64_t c = FewColumns::column();
  const double base = c < width ? static_cast<double>(partial[c]) : 0;
  double sum = 0, squares = 0;
  if (c < width)
#pragma unroll 4
    for (int64_t k = FewColumns::lane(); k < chunks; k += FewColumns::kLanes) {
      const double count = static_cast<double>(rows - k * chunk_rows < chunk_rows ? rows - k * chunk_rows : chunk_rows);
      const double distance = partial[2 * k * width + c] - base;
      sum += count * distance;
      squares += partial[(2 * k + 1) * width + c] + count * distance * distance;
    }
  const auto all = FewColumns::sum<2>({{sum, squares}});
  if (FewColumns::lane() != 0 || c >= width) return;
  const double n = static_cast<double>(rows), distance = all.of[0] / n, rest = all.of[1] - n * distance * distance;
  const double whole = base + distance, apart = rest < 0 ? 0 : rest;
  mean[c] = static_cast<A>(whole);
  rstd[c] = static_cast<A>(1 / sqrt(apart / n + eps));
  if (running_mean == nullptr) return;
  running_mean[c] = static_cast<A>(running_mean[c] + momentum * (whole - running_mean[c]));
  running_var[c] = static_cast<A>(running_var[c] + momentum * (apart / (n - 1) - running_var[c]));
}

template <class A>
struct InverseDeviation {
  double eps;
  __device__ A operator()(A var) const { return static_cast<A>(1 / sqrt(static_cast<double>(var) + eps)); }
};

template <int N, class X, class Y>
__global__ void batch_norm_kernel(int64_t packs, int64_t across, const X* x, const Acc<X>* mean, const Acc<X>* rstd, const Acc<X>* gamma,
                                  const Acc<X>* beta, Y* y, Y* xhat) {
  const ColumnLoop loop(packs, across);
  if (!loop.takes_part()) return;
  const int64_t c = loop.column * N;
  Acc<X> m[N], r[N], g[N], b[N];
  load_parameters<N>(mean + c, m), load_parameters<N>(rstd + c, r), load_parameters<N>(gamma + c, g), load_parameters<N>(beta + c, b);
  loop.each([&](int64_t i) { return elements_at<N>(x + i * N); },
            [&](int64_t i, auto& v) {
#pragma unroll
              for (int k = 0; k < N; ++k) v.v[k] = (v.v[k] - m[k]) * r[k];
              if (xhat != nullptr) store_whole(xhat + i * N, v.v);
#pragma unroll
              for (int k = 0; k < N; ++k) v.v[k] = affine_of(v.v[k], g[k], b[k]);
              store_whole(y + i * N, v.v);
            });
}

/// partial[chunk, 0, c] <- sum of dy xhat of the chunk's rows, partial[chunk, 1, c] <- of dy.
template <int N, class G, class H>
__global__ void chunk_sums_kernel(int64_t rows, int64_t width, int64_t chunk_rows, const G* dy, const H* xhat, Acc<G>* partial) {
  using A = Acc<G>;
  using Tile = ColumnTile<N>;
  const int64_t tiles = (width + Tile::kColumns - 1) / Tile::kColumns;
  const int64_t chunk = blockIdx.x / tiles, begin = blockIdx.x % tiles * Tile::kColumns, from = chunk * chunk_rows;
  const G* pg = dy + from * width;
  const H* ph = xhat + from * width;
  A to_gamma, to_beta;
  sum_tile<N>(rows - from < chunk_rows ? rows - from : chunk_rows, width, begin, to_gamma, to_beta,
              [=](int64_t row, int64_t c, A(&gamma)[N], A(&beta)[N]) {
                const auto g = elements_at<N>(pg + row * width + c);
                const auto h = elements_at<N>(ph + row * width + c);
#pragma unroll
                for (int k = 0; k < N; ++k) gamma[k] += g.v[k] * h.v[k], beta[k] += g.v[k];
              });
  if (threadIdx.x >= Tile::kColumns || begin + threadIdx.x >= width) return;
  partial[2 * chunk * width + begin + threadIdx.x] = to_gamma;
  partial[(2 * chunk + 1) * width + begin + threadIdx.x] = to_beta;
}

template <class A>
__global__ void add_chunks_kernel(int64_t width, int64_t chunks, const A* partial, A* dgamma, A* dbeta) {
  const int64_t c = FewColumns::column();
  double gamma = 0, beta = 0;
  if (c < width)
#pragma unroll 4
    for (int64_t k = FewColumns::lane(); k < chunks; k += FewColumns::kLanes)
      gamma += partial[2 * k * width + c], beta += partial[(2 * k + 1) * width + c];
  const auto all = FewColumns::sum<2>({{gamma, beta}});
  if (FewColumns::lane() != 0 || c >= width) return;
  dgamma[c] = static_cast<A>(all.of[0]);
  dbeta[c] = static_cast<A>(all.of[1]);
}

template <int N, class G, class H, class X>
__global__ void batch_norm_grad_kernel(int64_t packs, int64_t across, Acc<X> share, const G* dy, const H* xhat, const Acc<X>* rstd,
                                       const Acc<X>* gamma, const Acc<X>* dgamma, const Acc<X>* dbeta, X* dx) {
  using A = Acc<X>;
  const ColumnLoop loop(packs, across);
  if (!loop.takes_part()) return;
  const int64_t c = loop.column * N;
  A r[N], g[N], dg[N], db[N];
  load_parameters<N>(rstd + c, r), load_parameters<N>(gamma + c, g), load_parameters<N>(dgamma + c, dg), load_parameters<N>(dbeta + c, db);
  struct Operands {
    Elements<A, N> dy, xhat;
  };
  loop.each(
      [&](int64_t i) {
        return Operands{elements_at<N>(dy + i * N), elements_at<N>(xhat + i * N)};
      },
      [&](int64_t i, const Operands& of) {
        A out[N];
#pragma unroll
        for (int k = 0; k < N; ++k) out[k] = g[k] * r[k] * (of.dy.v[k] - db[k] * share - of.xhat.v[k] * (dg[k] * share));
        store_whole(dx + i * N, out);
      });
}

/// True if rows of `width` and values for each channel come in aligned pieces of N.
template <int N>
bool in_packs(int64_t width, std::initializer_list<std::pair<const Tensor*, size_t>> tensors) {
  bool packed = width % N == 0;
  for (const auto& [t, size] : tensors) packed = packed && (!t->defined() || aligned(t->raw(), std::min<size_t>(16, N * size)));
  return packed;
}

template <int N>
unsigned tile_blocks(int64_t rows, int64_t width) {
  return static_cast<unsigned>(chunks_of(rows) * ceil_div(width, ColumnTile<N>::kColumns));
}

}  // namespace

void batch_statistics(const Tensor& x, double eps, double momentum, const Tensor& mean, const Tensor& rstd, const Tensor& running_mean,
                      const Tensor& running_var) {
  const int64_t width = width_of(x), rows = x.rows();
  check_batch_statistics(x, mean, rstd, running_mean, running_var);
  dispatch(x.dtype(), x.dtype(), [&](auto tx, auto) {
    using X = decltype(tx);
    using A = Acc<X>;
    constexpr int N = kLaneElements<X>;
    const Tensor partial = Tensor::empty({chunks_of(rows), 2, width}, dtype_of<A>, x.device());
    const bool packed = in_packs<N>(width, {{&x, sizeof(X)}});
    launch("batch_statistics", packed ? &chunk_statistics_kernel<N, X> : &chunk_statistics_kernel<1, X>,
           packed ? tile_blocks<N>(rows, width) : tile_blocks<1>(rows, width), kColumnThreads, 0, rows, width, chunk_rows(rows),
           x.data<X>(), partial.data<A>());
    A *run_m = running_mean.defined() ? running_mean.data<A>() : nullptr, *run_v = run_m ? running_var.data<A>() : nullptr;
    launch("batch_statistics", &combine_kernel<A>, FewColumns::blocks(width), FewColumns::kThreads, 0, rows, width, chunk_rows(rows),
           chunks_of(rows), partial.data<A>(), eps, momentum, mean.data<A>(), rstd.data<A>(), run_m, run_v);
  });
}

void inverse_deviation(const Tensor& var, double eps, const Tensor& rstd) {
  check_alike(var, rstd, "inverse_deviation");
  dispatch_wide(var.dtype(), [&](auto tag) {
    using A = decltype(tag);
    map("inverse_deviation", InverseDeviation<A>{eps}, rstd.numel(), rstd.data<A>(), var.data<A>());
  });
}

void batch_norm(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& gamma, const Tensor& beta, const Tensor& y,
                const Tensor& xhat) {
  const int64_t width = width_of(x);
  check_batch_norm(x, mean, rstd, gamma, beta, y, xhat);
  if (x.numel() == 0) return;
  dispatch(x.dtype(), y.dtype(), [&](auto tx, auto ty) {
    using X = decltype(tx);
    using Y = decltype(ty);
    using A = Acc<X>;
    constexpr int N = kLaneElements<X, Y>;
    const bool packed = in_packs<N>(width, {{&x, sizeof(X)},
                                            {&y, sizeof(Y)},
                                            {&xhat, sizeof(Y)},
                                            {&mean, sizeof(A)},
                                            {&rstd, sizeof(A)},
                                            {&gamma, sizeof(A)},
                                            {&beta, sizeof(A)}});
    const int64_t across = width / (packed ? N : 1), packs = x.rows() * across;
    launch("batch_norm", packed ? &batch_norm_kernel<N, X, Y> : &batch_norm_kernel<1, X, Y>, ColumnLoop::grid(packs, across), kMapThreads,
           0, packs, across, x.data<X>(), mean.data<A>(), rstd.data<A>(), gamma.data<A>(), beta.data<A>(), y.data<Y>(),
           xhat.defined() ? xhat.data<Y>() : nullptr);
  });
}

void batch_norm_sums(const Tensor& dy, const Tensor& xhat, const Tensor& dgamma, const Tensor& dbeta) {
  const int64_t width = width_of(dy), rows = dy.rows();
  check_batch_norm_sums(dy, xhat, dgamma, dbeta);
  dispatch(dy.dtype(), xhat.dtype(), [&](auto tg, auto th) {
    using G = decltype(tg);
    using H = decltype(th);
    using A = Acc<G>;
    constexpr int N = kLaneElements<G, H>;
    const Tensor partial = Tensor::empty({chunks_of(rows), 2, width}, dtype_of<A>, dy.device());
    const bool packed = in_packs<N>(width, {{&dy, sizeof(G)}, {&xhat, sizeof(H)}});
    if (rows > 0)
      launch("batch_norm_sums", packed ? &chunk_sums_kernel<N, G, H> : &chunk_sums_kernel<1, G, H>,
             packed ? tile_blocks<N>(rows, width) : tile_blocks<1>(rows, width), kColumnThreads, 0, rows, width, chunk_rows(rows),
             dy.data<G>(), xhat.data<H>(), partial.data<A>());
    launch("batch_norm_sums", &add_chunks_kernel<A>, FewColumns::blocks(width), FewColumns::kThreads, 0, width, chunks_of(rows),
           partial.data<A>(), dgamma.data<A>(), dbeta.data<A>());
  });
}

void batch_norm_grad(const Tensor& dy, const Tensor& xhat, const Tensor& rstd, const Tensor& gamma, const Tensor& dgamma,
                     const Tensor& dbeta, const Tensor& dx) {
  const int64_t width = width_of(dy), rows = dy.rows();
  check_batch_norm_grad(dy, xhat, rstd, gamma, dgamma, dbeta, dx);
  if (dx.numel() == 0) return;
  dispatch(dy.dtype(), xhat.dtype(), dx.dtype(), [&](auto tg, auto th, auto tx) {
    using G = decltype(tg);
    using H = decltype(th);
    using X = decltype(tx);
    using A = Acc<X>;
    constexpr int N = kLaneElements<G, H, X>;
    const bool packed = in_packs<N>(width, {{&dy, sizeof(G)},
                                            {&xhat, sizeof(H)},
                                            {&dx, sizeof(X)},
                                            {&rstd, sizeof(A)},
                                            {&gamma, sizeof(A)},
                                            {&dgamma, sizeof(A)},
                                            {&dbeta, sizeof(A)}});
    const int64_t across = width / (packed ? N : 1), packs = rows * across;
    launch("batch_norm_grad", packed ? &batch_norm_grad_kernel<N, G, H, X> : &batch_norm_grad_kernel<1, G, H, X>,
           ColumnLoop::grid(packs, across), kMapThreads, 0, packs, across, A(1) / static_cast<A>(rows), dy.data<G>(), xhat.data<H>(),
           rstd.data<A>(), gamma.data<A>(), dgamma.data<A>(), dbeta.data<A>(), dx.data<X>());
  });
}

}  // namespace mesa::kernels::cuda
