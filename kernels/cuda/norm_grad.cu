// dx = rstd (g - mean(g) - xhat mean(g xhat)) with g = gamma dy, dgamma = sum dy xhat, dbeta = sum dy.
// A block walks over a chunk of the rows, so that dy and xhat are read once for all three: dx is finished there, dgamma and dbeta leave as
// the chunk's sums, which a second kernel adds up. Chunks depend on the shape alone, and so do the results.
#include "mesa/kernels/norm.h"
#include "rows.h"

namespace mesa::kernels::cuda {

namespace {

/// Registers that hold a thread's part of dy, xhat, dgamma, dbeta and, where no branch stands before its loads, gamma.
template <class Team>
constexpr int kRegisters = Team::kKeeps ? Team::kPieces* Team::kVector*(Team::kFull ? 5 : 4) : 0;
/// Warps of a block, and blocks that a multiprocessor is to hold at once, as the registers allow. There are as many chunks as 132
/// multiprocessors hold blocks, so that the largest GPUs of today work on all of them at once.
template <class Team>
constexpr int kWarps = kRegisters<Team> <= 60 ? 8 : 4;
template <class Team>
constexpr int kResident = kRegisters<Team> <= 32    ? 4
                          : kRegisters<Team> <= 120 ? 3
                                                    : 2;

template <class G, class H, class X>
struct NormGrad {
  using A = Acc<X>;
  using TypeG = G;
  using TypeH = H;
  const G* dy;
  const H* xhat;
  const A *rstd, *gamma;
  X* dx;
  int64_t rows, width, chunks;
  A* sums;  // [chunks, 2, width]: dgamma and dbeta of each chunk; null if neither is wanted

  __device__ int64_t chunk_begin(int64_t chunk) const { return rows * chunk / chunks; }
};

/// A thread's sums over the rows of its team: in registers if the team keeps rows, else where they are to go.
template <class Team, class A>
struct ColumnSums {
  static constexpr int V = Team::kVector;
  A kept[Team::kPieces][V] = {};
  A* out;  // [width], or null

  __device__ ColumnSums(A* out, int64_t width) : out(out) {
    if constexpr (!Team::kKeeps)
      if (out) Team::each(width, [&](int p, auto c) { store_pack(out + c, kept[p]); });
  }
  template <class Column>
  __device__ void add(int p, Column c, const A (&x)[V]) {
    if constexpr (!Team::kKeeps) {
      if (!out) return;
      load_pack(out + c, kept[p]);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) kept[p][i] += x[i];
    if constexpr (!Team::kKeeps) store_pack(out + c, kept[p]);
  }
  /// out <- the sums of all warps, in order. All threads of the block must call it.
  __device__ void finish(int64_t width) const {
    if constexpr (Team::kKeeps) {
      __shared__ __align__(32) A parts[kWarps<Team>][kWarp * Team::kPieces * V];
      __syncthreads();  // a previous call may still be read
      Team::each(width, [&](int p, auto c) { store_pack(parts[threadIdx.x / kWarp] + c, kept[p]); });
      __syncthreads();
#pragma unroll 1
      for (int c = threadIdx.x; c < static_cast<int>(width); c += kWarps<Team> * kWarp) {
        A sum = parts[0][c];
#pragma unroll
        for (int w = 1; w < kWarps<Team>; ++w) sum += parts[w][c];
        out[c] = sum;
      }
    }
  }
};

template <class Team, class Grad>
__global__ void __launch_bounds__(kWarps<Team>* kWarp, kResident<Team>) grad_chunk(Grad n) {
  using A = typename Grad::A;
  constexpr int V = Team::kVector;
  const Team team;
  const int64_t width = n.width, end = n.chunk_begin(blockIdx.x + 1), step = Team::kKeeps ? kWarps<Team> : 1;
  const A share = A(1) / static_cast<A>(width);
  A* const sums = n.sums ? n.sums + blockIdx.x * 2 * width : nullptr;
  ColumnSums<Team, A> dgamma(sums, width), dbeta(sums ? sums + width : nullptr, width);
  for (int64_t row = n.chunk_begin(blockIdx.x) + (Team::kKeeps ? threadIdx.x / kWarp : 0); row < end; row += step) {
    Values<Team, typename Grad::TypeG> dy(n.dy + row * width, width);
    Values<Team, typename Grad::TypeH> xhat(n.xhat + row * width, width);
    const A rstd = n.rstd[row];
    A sum_g = 0, sum_gh = 0;
    team.each(width, [&](int p, auto c) {
      const A(&d)[V] = dy.at(p, c), (&h)[V] = xhat.at(p, c);
      A gamma[V];
      load_parameters(n.gamma + c, gamma);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const A g = gamma[i] * d[i];
        sum_g += g;
        sum_gh += g * h[i];
      }
    });
    const A mean_g = team.sum(sum_g) * share, mean_gh = team.sum(sum_gh) * share;
    team.each(width, [&](int p, auto c) {
      const A(&d)[V] = dy.at(p, c), (&h)[V] = xhat.at(p, c);
      A gamma[V], dh[V], dx[V];
      load_parameters(n.gamma + c, gamma);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        dh[i] = d[i] * h[i];
        dx[i] = rstd * (gamma[i] * d[i] - mean_g - h[i] * mean_gh);
      }
      dgamma.add(p, c, dh);
      dbeta.add(p, c, d);
      store_pack(n.dx + row * width + c, dx);
    });
  }
  if (sums) {
    dgamma.finish(width);
    dbeta.finish(width);
  }
}

/// out[c] <- (accumulate ? out[c] : 0) + sum_k sums[k, 0, c], in double: the chunks k, k + 32, .. in one thread, then those 32 in order.
template <class A, class Out>
__device__ void add_chunks(const A* sums, int64_t chunks, int64_t width, Out* out, bool accumulate) {
  __shared__ double parts[kWarp][kWarp];
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  double sum = 0;
  if (c < width) {
#pragma unroll 8
    for (int64_t k = threadIdx.y; k < chunks; k += kWarp) sum += sums[k * 2 * width + c];
  }
  parts[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || c >= width) return;
  sum = accumulate ? static_cast<double>(out[c]) : 0.0;
  for (int k = 0; k < kWarp; ++k) sum += parts[k][threadIdx.x];
  out[c] = static_cast<Out>(sum);
}
template <class A, class ToGamma, class ToBeta>
__global__ void finish_grad(const A* sums, int64_t chunks, int64_t width, ToGamma* dgamma, bool accumulate_gamma, ToBeta* dbeta,
                            bool accumulate_beta) {
  if (blockIdx.y == 0 && dgamma) add_chunks(sums, chunks, width, dgamma, accumulate_gamma);
  if (blockIdx.y == 1 && dbeta) add_chunks(sums + width, chunks, width, dbeta, accumulate_beta);
}

/// Computes dx and, if wanted, returns the sums of the chunks [chunks, 2, width].
template <class Team, class Grad>
Tensor run_chunks(Grad grad, bool want_sums, Device device) {
  using A = typename Grad::A;
  grad.chunks = std::min<int64_t>(132 * kResident<Team>, ceil_div(grad.rows, kWarps<Team>));
  const Shape shape{grad.chunks, 2, grad.width};
  const Tensor sums = want_sums ? Tensor::empty(shape, dtype_of<A>, device) : Tensor();
  if (want_sums) grad.sums = sums.data<A>();
  if (grad.chunks > 0)
    launch("layer_norm_grad", &grad_chunk<Team, Grad>, static_cast<unsigned>(grad.chunks), kWarps<Team> * kWarp, 0, grad);
  return sums;
}

template <class G, class H, class X>
Tensor run_grad(const NormGrad<G, H, X>& grad, bool want_sums, Device device) {
  constexpr int V = kVectorOf<G, H, X>;
  const bool vectors = in_vectors<V>(grad.dy, grad.width, grad.width) && in_vectors<V>(grad.xhat, grad.width, grad.width) &&
                       in_vectors<V>(grad.dx, grad.width, grad.width) && aligned(grad.gamma, 16);
  Tensor sums;
  const auto run = [&](auto team) { sums = run_chunks<decltype(team)>(grad, want_sums, device); };
  if (vectors)
    with_team<V, (V > 1)>(grad.width, run);
  else
    with_team<1, false>(grad.width, run);
  return sums;
}

template <class A>
void finish(const Tensor& sums, const Tensor& dgamma, bool accumulate_gamma, const Tensor& dbeta, bool accumulate_beta) {
  const auto type = [](const Tensor& out) { return out.defined() ? out.dtype() : dtype_of<A>; };
  dispatch_wide(type(dgamma), [&](auto tg) {
    dispatch_wide(type(dbeta), [&](auto tb) {
      using ToGamma = decltype(tg);
      using ToBeta = decltype(tb);
      launch("layer_norm_grad", &finish_grad<A, ToGamma, ToBeta>, dim3(static_cast<unsigned>(ceil_div(sums.dim(2), kWarp)), 2),
             dim3(kWarp, kWarp), 0, sums.data<A>(), sums.dim(0), sums.dim(2), dgamma.defined() ? dgamma.data<ToGamma>() : nullptr,
             accumulate_gamma, dbeta.defined() ? dbeta.data<ToBeta>() : nullptr, accumulate_beta);
    });
  });
}

}  // namespace

void layer_norm_grad(const Tensor& dy, const Tensor& xhat, const Tensor& rstd, const Tensor& gamma, const Tensor& dx, const Tensor& dgamma,
                     const Tensor& dbeta, bool accumulate_gamma, bool accumulate_beta) {
  const int64_t width = width_of(dy), rows = dy.rows();
  check_alike(dy, xhat, "layer_norm_grad: xhat");
  check_alike(dy, dx, "layer_norm_grad: dx");
  check_parameter(gamma, width, "gamma");
  check(rstd.is_contiguous() && rstd.numel() == rows, "layer_norm_grad: rstd has ", rstd.numel(), " elements for ", rows, " rows");
  if (dgamma.defined()) check_parameter(dgamma, width, "dgamma");
  if (dbeta.defined()) check_parameter(dbeta, width, "dbeta");
  if (width == 0) return;
  dispatch(dy.dtype(), xhat.dtype(), dx.dtype(), [&](auto tg, auto th, auto tx) {
    using G = decltype(tg);
    using H = decltype(th);
    using X = decltype(tx);
    using A = Acc<X>;
    const bool want_sums = dgamma.defined() || dbeta.defined();
    const NormGrad<G, H, X> grad{dy.data<G>(), xhat.data<H>(), rstd.data<A>(), gamma.data<A>(), dx.data<X>(), rows, width, 0, nullptr};
    const Tensor sums = run_grad(grad, want_sums, dy.device());
    if (want_sums) finish<A>(sums, dgamma, accumulate_gamma, dbeta, accumulate_beta);
  });
}

}  // namespace mesa::kernels::cuda
