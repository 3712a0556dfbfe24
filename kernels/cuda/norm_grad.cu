// dx = rstd (g - mean(g) - xhat mean(g xhat)) with g = gamma dy, dgamma = sum dy xhat, dbeta = sum dy; and, where wanted,
// dx once more in bf16, perhaps times a factor of each sample, the sums of its columns, and y = gamma xhat + beta.
// A block walks over a chunk of the rows, so that dy and xhat are read once for all three: dx is finished there, dgamma and dbeta leave as
// the chunk's sums, which a second kernel adds up. Chunks depend on the shape alone, and so do the results.
#include <optional>

#include "codec.cuh"
#include "mesa/kernels/norm.h"
#include "norm_row.h"

namespace mesa::kernels::cuda {

namespace {

/// Elements of a row that a lane keeps: registers for dy, xhat, what dx is added to, dgamma, dbeta, gamma and beta hold that many each.
template <class Team>
constexpr int kElements = Team::kKeeps ? Team::kPieces* Team::kVector : 0;
/// Warps of a block, and blocks that a multiprocessor is to hold at once, as the registers allow: loads that are under way together count
/// for more than warps. There are as many chunks as 132 multiprocessors hold blocks (layer_norm_grad_parts), so that the largest GPUs of
/// today work on all of them at once.
template <class Team>
constexpr int kWarps = kElements<Team> <= 12 ? 8 : 4;
template <class Team>
constexpr int kResident = kElements<Team> <= 4   ? 4
                          : kElements<Team> <= 8 ? 3
                                                 : 2;

/// xhat as values,
template <class T>
struct ValueRows {
  using Type = T;
  const T* base;
  template <class Team>
  __device__ Values<Team, T> of(int64_t row, int64_t width) const {
    return {base + row * width, width};
  }
};
/// or as codes, decoded and rounded to T as they are read. A piece of a thread lies in one group.
template <class Team, class T>
class DecodedValues;
template <class T>
struct CodedRows {
  using Type = T;
  const uint8_t* codes;
  const float *step, *offset;
  int bits;
  Divider inner, groups;  ///< in pieces
  template <class Team>
  __device__ DecodedValues<Team, T> of(int64_t row, int64_t width) const {
    return {*this, row, width};
  }
};
template <class Team, class T>
class DecodedValues {
 public:
  static constexpr int V = Team::kVector;
  __device__ DecodedValues(const CodedRows<T>& x, int64_t row, int64_t width) {
    const uint32_t first = static_cast<uint32_t>(row * (width / V));
    if (x.bits == 8)
      read<8>(x, first, width);
    else if (x.bits == 4)
      read<4>(x, first, width);
    else
      read<2>(x, first, width);
  }
  template <class Column>
  __device__ const float (&at(int p, Column) const)[V] {
    return kept_[p];
  }

 private:
  template <int bits>
  __device__ void read(const CodedRows<T>& x, uint32_t first, int64_t width) {
    if constexpr (V * bits >= 8) {
      using Word = Bits<V * bits>;
      Word words[Team::kPieces]{};
      Team::each(width, [&](int p, auto c) { words[p] = __ldcs(reinterpret_cast<const Word*>(x.codes) + first + c / V); });
      Team::each(width, [&](int p, auto c) {
        const uint32_t group = x.groups.remainder(x.inner.quotient(first + c / V));
        const float step = __ldg(x.step + group), offset = __ldg(x.offset + group);
#pragma unroll
        for (int i = 0; i < V; ++i)
          kept_[p][i] = rounded_to<T>(dequantize_value(static_cast<uint8_t>(words[p] >> i * bits & ((1u << bits) - 1)), step, offset));
      });
    }
  }
  float kept_[Team::kPieces][V];
};
template <class G, class H, class X>
struct NormGrad {
  using A = Acc<X>;
  using TypeG = G;
  using TypeX = X;
  const G* dy;
  H xhat;  // ValueRows or CodedRows
  const A *rstd, *gamma, *beta;
  X* dx;
  bf16* dx_copy;          // or null
  const A* copy_factors;  // [rows / rows_of_factor]; null: 1
  Divider rows_of_factor;
  typename H::Type* y;  // gamma xhat + beta; null if not wanted
  int64_t rows, width, chunks;
  bool add;    // dx to what is there
  A* dx_sums;  // [chunks, width], or null
  A* sums;     // [chunks, 2, width]: dgamma and dbeta of each chunk; null if neither is wanted

  __device__ int64_t chunk_begin(int64_t chunk) const { return rows * chunk / chunks; }
};

/// What dx holds before, read with all else of the row; zeros where nothing is to be added to.
template <class Team, class X>
class Before {
 public:
  static constexpr int V = Team::kVector;
  __device__ Before(const X* row, int64_t width) : row_(row) {
    if constexpr (Team::kKeeps)
      if (row_) Team::each(width, [&](int p, auto c) { load_pack(row_ + c, kept_[p]); });
  }
  template <class Column>
  __device__ const Acc<X> (&at(int p, Column c))[V] {
    if constexpr (!Team::kKeeps)
      if (row_) load_pack(row_ + c, kept_[p]);
    return kept_[p];
  }

 private:
  const X* row_;
  Acc<X> kept_[Team::kPieces][V] = {};
};

/// A thread's sums of its columns over the rows of its team, in registers,
template <class Team, class A>
class SumsKept {
 public:
  static constexpr int V = Team::kVector;
  template <class Column>
  __device__ void add(int p, Column, const A (&x)[V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) kept_[p][i] += x[i];
  }
  __device__ void store(A* row, int64_t width) const {
    Team::each(width, [&](int p, auto c) { store_pack(row + c, kept_[p]); });
  }

 private:
  A kept_[Team::kPieces][V] = {};
};
/// or, where somebody wants them, in a row of memory that is the team's own.
template <class Team, class A>
class SumsInRow {
 public:
  static constexpr int V = Team::kVector;
  __device__ SumsInRow(A* row, bool wanted, int64_t width) : row_(row), wanted_(wanted) {
    const A none[V] = {};
    if (wanted) Team::each(width, [&](int, auto c) { store_pack(row + c, none); });
  }
  template <class Column>
  __device__ void add(int, Column c, const A (&x)[V]) const {
    if (!wanted_) return;
    A sum[V];
    load_pack(row_ + c, sum);
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] += x[i];
    store_pack(row_ + c, sum);
  }

 private:
  A* row_;
  bool wanted_;
};
template <class Team, class A>
__device__ auto sums_of(A* row, int64_t width) {
  if constexpr (Team::kKeeps)
    return SumsKept<Team, A>();
  else
    return SumsInRow<Team, A>(row, row != nullptr, width);
}

/// A row of sums for each warp of a block, in shared memory. (Not used where the team is the block.)
template <class Team, class A>
struct WarpRows {
  A rows[Team::kKeeps ? kWarps<Team> : 1][Team::kKeeps ? kWarp * Team::kPieces * Team::kVector : 1];

  __device__ A* own() { return rows[threadIdx.x / kWarp]; }
  /// out <- the sums of all warps, in order. All threads of the block must call it.
  __device__ void add_up(A* out, int64_t width) const {
    __syncthreads();
#pragma unroll 1
    for (int c = threadIdx.x; c < static_cast<int>(width); c += kWarps<Team> * kWarp) {
      A sum = rows[0][c];
#pragma unroll
      for (int w = 1; w < kWarps<Team>; ++w) sum += rows[w][c];
      out[c] = sum;
    }
    __syncthreads();  // the rows may be written again
  }
};

template <class Team, class Grad>
__global__ void __launch_bounds__(kWarps<Team>* kWarp, kResident<Team>) grad_chunk(Grad n) {
  using A = typename Grad::A;
  constexpr int V = Team::kVector;
  const Team team;
  const int64_t width = n.width, end = n.chunk_begin(blockIdx.x + 1), step = Team::kKeeps ? kWarps<Team> : 1;
  const A share = A(1) / static_cast<A>(width);
  __shared__ __align__(32) WarpRows<Team, A> rows;
  A* const sums = n.sums ? n.sums + blockIdx.x * 2 * width : nullptr;
  A* const dx_sums = n.dx_sums ? n.dx_sums + blockIdx.x * width : nullptr;
  auto dgamma = sums_of<Team>(sums, width), dbeta = sums_of<Team>(sums ? sums + width : nullptr, width);
  const SumsInRow<Team, A> of_dx(Team::kKeeps ? rows.own() : dx_sums, dx_sums != nullptr, width);  // no registers are left for these
  for (int64_t row = n.chunk_begin(blockIdx.x) + (Team::kKeeps ? threadIdx.x / kWarp : 0); row < end; row += step) {
    Values<Team, typename Grad::TypeG> dy(n.dy + row * width, width);
    auto xhat = n.xhat.template of<Team>(row, width);
    Before<Team, typename Grad::TypeX> before(n.add ? n.dx + row * width : nullptr, width);
    const A rstd = n.rstd[row], factor = n.copy_factors ? n.copy_factors[n.rows_of_factor.quotient(static_cast<uint32_t>(row))] : A(1);
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
      const A(&d)[V] = dy.at(p, c), (&h)[V] = xhat.at(p, c), (&sum)[V] = before.at(p, c);
      A gamma[V], dh[V], dx[V];
      load_parameters(n.gamma + c, gamma);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        dh[i] = d[i] * h[i];
        dx[i] = sum[i] + rstd * (gamma[i] * d[i] - mean_g - h[i] * mean_gh);
      }
      dgamma.add(p, c, dh);
      dbeta.add(p, c, d);
      store_pack(n.dx + row * width + c, dx);
      if (n.dx_copy) {
#pragma unroll
        for (int i = 0; i < V; ++i) dx[i] *= factor;
        store_pack(n.dx_copy + row * width + c, dx);
      }
      of_dx.add(p, c, dx);
      if (n.y) {
        A beta[V], y[V];
        load_parameters(n.beta + c, beta);
#pragma unroll
        for (int i = 0; i < V; ++i) y[i] = affine_of(h[i], gamma[i], beta[i]);
        store_pack(n.y + row * width + c, y);
      }
    });
  }
  if constexpr (Team::kKeeps) {
    if (dx_sums) rows.add_up(dx_sums, width);
    if (!sums) return;
    dgamma.store(rows.own(), width);
    rows.add_up(sums, width);
    dbeta.store(rows.own(), width);
    rows.add_up(sums + width, width);
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
  grad.chunks = layer_norm_grad_parts(grad.rows, grad.width);
  const Shape shape{grad.chunks, 2, grad.width};
  const Tensor sums = want_sums ? Tensor::empty(shape, dtype_of<A>, device) : Tensor();
  if (want_sums) grad.sums = sums.data<A>();
  if (grad.chunks > 0)
    launch("layer_norm_grad", &grad_chunk<Team, Grad>, static_cast<unsigned>(grad.chunks), kWarps<Team> * kWarp, 0, grad);
  return sums;
}

/// True if dy, dx and gamma can be read and written in pieces of V.
template <int V, class G, class H, class X>
bool has_vectors(const NormGrad<G, H, X>& grad) {
  return in_vectors<V>(grad.dy, grad.width, grad.width) && in_vectors<V>(grad.dx, grad.width, grad.width) && aligned(grad.gamma, 16) &&
         aligned(grad.beta, 16) && aligned(grad.dx_sums, 16) && in_vectors<V>(grad.dx_copy, grad.width, grad.width) &&
         in_vectors<V>(grad.y, grad.width, grad.width);
}

template <class G, class H, class X>
Tensor run_grad(const NormGrad<G, ValueRows<H>, X>& grad, bool want_sums, Device device) {
  constexpr int V = kVectorOf<G, H, X>;
  Tensor sums;
  constexpr bool often = std::is_same_v<G, H> && sizeof(G) <= sizeof(X);  // dy has the type of what the layer kept
  const auto run = [&](auto team) { sums = run_chunks<decltype(team)>(grad, want_sums, device); };
  if (has_vectors<V>(grad) && in_vectors<V>(grad.xhat.base, grad.width, grad.width))
    with_team<V, often && (V > 1)>(grad.width, run);
  else
    with_team<1, false>(grad.width, run);
  return sums;
}
/// The same from codes; nothing where a thread's pieces cannot be decoded by themselves.
template <class G, class X>
std::optional<Tensor> run_grad(NormGrad<G, CodedRows<G>, X> grad, const GroupLayout& layout, bool want_sums, Device device) {
  constexpr int kWidest = kVectorOf<G, X>;
  std::optional<Tensor> sums;
  if (!has_vectors<kWidest>(grad)) return sums;
  with_team<kWidest, true>(grad.width, [&](auto team) {
    using Team = decltype(team);
    constexpr int V = Team::kVector;
    if constexpr (Team::kKeeps && V > 1) {
      CodedRows<G>& from = grad.xhat;
      const int bits = V * from.bits;
      if (bits % 8 != 0 || layout.inner % V != 0 || !aligned(from.codes, bits / 8) || grad.rows * grad.width / V >= int64_t{1} << 31)
        return;
      from.inner = Divider(layout.inner / V), from.groups = Divider(layout.groups);
      sums = run_chunks<Team>(grad, want_sums, device);
    }
  });
  return sums;
}

template <class A>
void finish(const Tensor& sums, const LayerNormGrads& to) {
  const auto type = [](const Tensor& out) { return out.defined() ? out.dtype() : dtype_of<A>; };
  dispatch_wide(type(to.dgamma), [&](auto tg) {
    dispatch_wide(type(to.dbeta), [&](auto tb) {
      using ToGamma = decltype(tg);
      using ToBeta = decltype(tb);
      launch("layer_norm_grad", &finish_grad<A, ToGamma, ToBeta>, dim3(static_cast<unsigned>(ceil_div(sums.dim(2), kWarp)), 2),
             dim3(kWarp, kWarp), 0, sums.data<A>(), sums.dim(0), sums.dim(2), to.dgamma.defined() ? to.dgamma.data<ToGamma>() : nullptr,
             to.add_gamma, to.dbeta.defined() ? to.dbeta.data<ToBeta>() : nullptr, to.add_beta);
    });
  });
}
bool wants_sums(const LayerNormGrads& to) { return to.dgamma.defined() || to.dbeta.defined(); }

template <class G, class X, class H>
NormGrad<G, H, X> grad_of(const Tensor& dy, const H& xhat, const Tensor& rstd, const Tensor& gamma, const Tensor& beta,
                          const LayerNormGrads& to) {
  using A = Acc<X>;
  using Y = typename H::Type;
  return {dy.data<G>(),
          xhat,
          rstd.data<A>(),
          gamma.data<A>(),
          to.y.defined() ? beta.data<A>() : nullptr,
          to.dx.data<X>(),
          to.dx_copy.defined() ? to.dx_copy.data<bf16>() : nullptr,
          to.copy_factors.defined() ? to.copy_factors.data<A>() : nullptr,
          Divider(to.copy_factors.defined() ? dy.rows() / to.copy_factors.numel() : 1),
          to.y.defined() ? to.y.data<Y>() : nullptr,
          dy.rows(),
          width_of(dy),
          0,
          to.add_x,
          to.dx_sums.defined() ? to.dx_sums.data<A>() : nullptr,
          nullptr};
}

}  // namespace

void layer_norm_grad(const Tensor& dy, const Tensor& xhat, const Tensor& rstd, const Tensor& gamma, const Tensor& beta,
                     const LayerNormGrads& to) {
  check_layer_norm_grad(dy, rstd, gamma, beta, to, xhat.dtype());
  check_alike(dy, xhat, "layer_norm_grad: xhat");
  if (width_of(dy) == 0) return;
  dispatch(dy.dtype(), xhat.dtype(), to.dx.dtype(), [&](auto tg, auto th, auto tx) {
    using X = decltype(tx);
    const ValueRows<decltype(th)> rows{xhat.data<decltype(th)>()};
    const Tensor sums = run_grad(grad_of<decltype(tg), X>(dy, rows, rstd, gamma, beta, to), wants_sums(to), dy.device());
    if (wants_sums(to)) finish<Acc<X>>(sums, to);
  });
}

void layer_norm_grad_coded(const Tensor& dy, const Coded& xhat, const Tensor& rstd, const Tensor& gamma, const Tensor& beta,
                           const LayerNormGrads& to) {
  check_layer_norm_grad(dy, rstd, gamma, beta, to, dy.dtype());
  check_layout(dy, xhat.layout);
  const float *const step = per_group(xhat.step, xhat.layout), *const offset = per_group(xhat.offset, xhat.layout);
  const uint8_t* const codes = code_bytes(xhat.codes, dy.numel(), xhat.bits);
  bool done = false;
  if (to.dx.dtype() == DType::f32 && dy.dtype() != DType::f64 && dy.numel() > 0) {
    dispatch_narrow(dy.dtype(), [&](auto tg) {
      using G = decltype(tg);
      const CodedRows<G> rows{codes, step, offset, xhat.bits, Divider(), Divider()};
      const auto sums = run_grad(grad_of<G, float>(dy, rows, rstd, gamma, beta, to), xhat.layout, wants_sums(to), dy.device());
      done = sums.has_value();
      if (done && wants_sums(to)) finish<float>(*sums, to);
    });
  }
  if (!done) layer_norm_grad(dy, decoded(xhat, dy), rstd, gamma, beta, to);
}

}  // namespace mesa::kernels::cuda
