// mean = sum x / n, var = sum (x - mean)^2 / n over the rows of each channel; xhat = (x - mean) / sqrt(var + eps), y = gamma xhat + beta;
// dgamma = sum dy xhat, dbeta = sum dy, dx = gamma rstd (dy - dbeta / n - xhat dgamma / n).
#include "column_sums.h"
#include "mesa/kernels/batch_norm_common.h"
#include "norm_row.h"
#include "pointwise.h"

namespace mesa::kernels::cuda {
namespace {

constexpr int kChunkRows = 256;  // rows of a block's tile: 64 KB of 256 bytes each, which the L2 cache still has for the second look

/// Sums over the rows of one tile of columns: thread t < kColumns gets term(row, column) of its column for two terms at once. A lane adds
/// runs of a few rows each, so that f32 sums stay short, then the lanes' sums are added in order. All threads of the block must call it.
template <int N, class A, class F>
__device__ inline void sum_tile(int64_t rows, int64_t width, int64_t begin, A& first, A& second, const F& term) {
  using Tile = ColumnTile<N>;
  __shared__ Pack<A, N> parts[2][Tile::kRows][Tile::kAcross];
  const int column = threadIdx.x % Tile::kAcross, lane = threadIdx.x / Tile::kAcross;
  Pack<A, N> sums[2]{};
  if (begin + column * N < width)
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

/// partial[chunk, 0, c] <- the mean of the chunk's rows, partial[chunk, 1, c] <- their sum of (x - mean)^2.
template <int N, class X>
__global__ void chunk_statistics_kernel(int64_t rows, int64_t width, const X* x, Acc<X>* partial) {
  using A = Acc<X>;
  using Tile = ColumnTile<N>;
  __shared__ A means[Tile::kColumns];
  const int64_t tiles = (width + Tile::kColumns - 1) / Tile::kColumns;
  const int64_t chunk = blockIdx.x / tiles, begin = blockIdx.x % tiles * Tile::kColumns, from = chunk * kChunkRows;
  const int64_t count = rows - from < kChunkRows ? rows - from : kChunkRows;
  const X* tile = x + from * width;
  A sum, squares, rest;
  sum_tile<N>(count, width, begin, sum, rest, [=](int64_t row, int64_t c, A(&total)[N], A(&)[N]) {
    const auto v = elements_at<N>(tile + row * width + c);
#pragma unroll
    for (int k = 0; k < N; ++k) total[k] += v.v[k];
  });
  if (threadIdx.x < Tile::kColumns) means[threadIdx.x] = sum / static_cast<A>(count);
  __syncthreads();
  const A* mean = means;
  sum_tile<N>(count, width, begin, squares, rest, [=](int64_t row, int64_t c, A(&total)[N], A(&)[N]) {
    const auto v = elements_at<N>(tile + row * width + c);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const A apart = v.v[k] - mean[c - begin + k];
      total[k] += apart * apart;
    }
  });
  if (threadIdx.x >= Tile::kColumns || begin + threadIdx.x >= width) return;
  partial[2 * chunk * width + begin + threadIdx.x] = means[threadIdx.x];
  partial[(2 * chunk + 1) * width + begin + threadIdx.x] = squares;
}

constexpr int kFinishLanes = 16;

/// The sum over lanes of a block of kFinishLanes warps, in order, in every thread; each thread's column is its lane of the warp.
__device__ inline double sum_lanes(double value) {
  __shared__ double parts[kFinishLanes][kWarp];
  __syncthreads();
  parts[threadIdx.x / kWarp][threadIdx.x % kWarp] = value;
  __syncthreads();
  double total = 0;
  for (int l = 0; l < kFinishLanes; ++l) total += parts[l][threadIdx.x % kWarp];
  return total;
}

/// The whole from the chunks (Chan, Golub and LeVeque, 1979), in double: squares = sum of the chunks' and of n_k (mean_k - mean)^2.
template <class A>
__global__ void combine_kernel(int64_t rows, int64_t width, int64_t chunks, const A* partial, double eps, double momentum, A* mean, A* rstd,
                               A* running_mean, A* running_var) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  const auto count = [=](int64_t k) {
    return static_cast<double>(rows - k * kChunkRows < kChunkRows ? rows - k * kChunkRows : kChunkRows);
  };
  double sum = 0, squares = 0;
  if (c < width)
    for (int64_t k = threadIdx.x / kWarp; k < chunks; k += kFinishLanes) sum += count(k) * partial[2 * k * width + c];
  const double whole = sum_lanes(sum) / static_cast<double>(rows);
  if (c < width)
    for (int64_t k = threadIdx.x / kWarp; k < chunks; k += kFinishLanes) {
      const double apart = partial[2 * k * width + c] - whole;
      squares += partial[(2 * k + 1) * width + c] + count(k) * apart * apart;
    }
  squares = sum_lanes(squares);
  if (threadIdx.x >= kWarp || c >= width) return;
  mean[c] = static_cast<A>(whole);
  rstd[c] = static_cast<A>(1 / sqrt(squares / static_cast<double>(rows) + eps));
  if (running_mean == nullptr) return;
  running_mean[c] = static_cast<A>(running_mean[c] + momentum * (whole - running_mean[c]));
  running_var[c] = static_cast<A>(running_var[c] + momentum * (squares / static_cast<double>(rows - 1) - running_var[c]));
}

template <class A>
struct InverseDeviation {
  double eps;
  __device__ A operator()(A var) const { return static_cast<A>(1 / sqrt(static_cast<double>(var) + eps)); }
};

/// One thread for N channels of a row; the parameters come from the cache.
template <int N, class X, class Y>
__global__ void batch_norm_kernel(int64_t packs, int64_t across, const X* x, const Acc<X>* mean, const Acc<X>* rstd, const Acc<X>* gamma,
                                  const Acc<X>* beta, Y* y, Y* xhat) {
  using A = Acc<X>;
  for (int64_t i = global_index(); i < packs; i += global_stride()) {
    const int64_t c = (i - i / across * across) * N;
    A m[N], r[N], g[N], b[N];
    load_parameters<N>(mean + c, m), load_parameters<N>(rstd + c, r), load_parameters<N>(gamma + c, g), load_parameters<N>(beta + c, b);
    auto v = elements_at<N>(x + i * N);
#pragma unroll
    for (int k = 0; k < N; ++k) v.v[k] = (v.v[k] - m[k]) * r[k];
    if (xhat != nullptr) store_pack(xhat + i * N, v.v);
#pragma unroll
    for (int k = 0; k < N; ++k) v.v[k] = affine_of(v.v[k], g[k], b[k]);
    store_pack(y + i * N, v.v);
  }
}

/// partial[chunk, 0, c] <- sum of dy xhat of the chunk's rows, partial[chunk, 1, c] <- of dy.
template <int N, class G, class H>
__global__ void chunk_sums_kernel(int64_t rows, int64_t width, const G* dy, const H* xhat, Acc<G>* partial) {
  using A = Acc<G>;
  using Tile = ColumnTile<N>;
  const int64_t tiles = (width + Tile::kColumns - 1) / Tile::kColumns;
  const int64_t chunk = blockIdx.x / tiles, begin = blockIdx.x % tiles * Tile::kColumns, from = chunk * kChunkRows;
  const G* pg = dy + from * width;
  const H* ph = xhat + from * width;
  A to_gamma, to_beta;
  sum_tile<N>(rows - from < kChunkRows ? rows - from : kChunkRows, width, begin, to_gamma, to_beta,
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
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  double gamma = 0, beta = 0;
  if (c < width)
    for (int64_t k = threadIdx.x / kWarp; k < chunks; k += kFinishLanes)
      gamma += partial[2 * k * width + c], beta += partial[(2 * k + 1) * width + c];
  gamma = sum_lanes(gamma), beta = sum_lanes(beta);
  if (threadIdx.x >= kWarp || c >= width) return;
  dgamma[c] = static_cast<A>(gamma);
  dbeta[c] = static_cast<A>(beta);
}

template <int N, class G, class H, class X>
__global__ void batch_norm_grad_kernel(int64_t packs, int64_t across, Acc<X> share, const G* dy, const H* xhat, const Acc<X>* rstd,
                                       const Acc<X>* gamma, const Acc<X>* dgamma, const Acc<X>* dbeta, X* dx) {
  using A = Acc<X>;
  for (int64_t i = global_index(); i < packs; i += global_stride()) {
    const int64_t c = (i - i / across * across) * N;
    A r[N], g[N], dg[N], db[N], out[N];
    load_parameters<N>(rstd + c, r), load_parameters<N>(gamma + c, g), load_parameters<N>(dgamma + c, dg),
        load_parameters<N>(dbeta + c, db);
    const auto d = elements_at<N>(dy + i * N);
    const auto h = elements_at<N>(xhat + i * N);
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = g[k] * r[k] * (d.v[k] - db[k] * share - h.v[k] * (dg[k] * share));
    store_pack(dx + i * N, out);
  }
}

/// True if rows of `width` and values for each channel come in aligned pieces of N.
template <int N>
bool in_packs(int64_t width, std::initializer_list<std::pair<const Tensor*, size_t>> tensors) {
  bool packed = width % N == 0;
  for (const auto& [t, size] : tensors) packed = packed && (!t->defined() || aligned(t->raw(), std::min<size_t>(16, N * size)));
  return packed;
}

int64_t chunks_of(int64_t rows) { return ceil_div(rows, kChunkRows); }

template <int N>
unsigned tile_blocks(int64_t rows, int64_t width) {
  return static_cast<unsigned>(chunks_of(rows) * ceil_div(width, ColumnTile<N>::kColumns));
}
unsigned column_blocks(int64_t width) { return static_cast<unsigned>(ceil_div(width, kWarp)); }

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
           packed ? tile_blocks<N>(rows, width) : tile_blocks<1>(rows, width), kColumnThreads, 0, rows, width, x.data<X>(),
           partial.data<A>());
    A *run_m = running_mean.defined() ? running_mean.data<A>() : nullptr, *run_v = run_m ? running_var.data<A>() : nullptr;
    launch("batch_statistics", &combine_kernel<A>, column_blocks(width), kFinishLanes * kWarp, 0, rows, width, chunks_of(rows),
           partial.data<A>(), eps, momentum, mean.data<A>(), rstd.data<A>(), run_m, run_v);
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
    launch("batch_norm", packed ? &batch_norm_kernel<N, X, Y> : &batch_norm_kernel<1, X, Y>, grid_for(packs, kMapThreads, kMapBlocks),
           kMapThreads, 0, packs, across, x.data<X>(), mean.data<A>(), rstd.data<A>(), gamma.data<A>(), beta.data<A>(), y.data<Y>(),
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
             packed ? tile_blocks<N>(rows, width) : tile_blocks<1>(rows, width), kColumnThreads, 0, rows, width, dy.data<G>(),
             xhat.data<H>(), partial.data<A>());
    launch("batch_norm_sums", &add_chunks_kernel<A>, column_blocks(width), kFinishLanes * kWarp, 0, width, chunks_of(rows),
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
           grid_for(packs, kMapThreads, kMapBlocks), kMapThreads, 0, packs, across, A(1) / static_cast<A>(rows), dy.data<G>(),
           xhat.data<H>(), rstd.data<A>(), gamma.data<A>(), dgamma.data<A>(), dbeta.data<A>(), dx.data<X>());
  });
}

}  // namespace mesa::kernels::cuda
