// With P = exp(scale q k^T - lse), dP = dO v^T and dS = P (dP - delta): dv = P^T dO, dq = scale dS k, dk = scale dS^T q (Dao et al., 2022).
// Two passes, so that every sum has one owner and a fixed order: queries meet all keys for dq, then keys meet all queries for dk and dv.
// The first also finds delta = sum_d dO o. Without o and lse it first meets the keys once more, for lse and delta = sum_j P dP.
#include "attention_window.cuh"
#include "mesa/kernels/attention.h"
#include "mesa/kernels/elementwise.h"

namespace mesa::kernels::cuda {
namespace {

/// A tile each.
inline constexpr int kWarps = 8;
/// Blocks of a multiprocessor: as many as leave each thread the registers it needs.
template <int head>
inline constexpr int kBlocks = head == 64 ? 2 : 3;
/// What a block may use on every GPU from compute capability 8.0 on.
inline constexpr size_t kSharedBytes = 99 << 10;

template <class Seen>
struct Problem {
  Extent extent;
  Seen seen;  ///< NoWindows or InWindows
  Operand q, k, v, o, d_o, dq, dk, dv;
  float *lse, *delta;  ///< [B, H, N], or [B windows, H, n]
  float scale;
};

// --- dq ---------------------------------------------------------------------------------------------------------------------------

/// 16 queries; lse in units of log2.
template <int head>
struct Queries {
  uint32_t q[head / 16][4], d_o[head / 16][4];
  float dq[head / 8][4];
  float lse[2], delta[2];  ///< of each half's row
};

/// Sums over the keys that this lane has seen of each half's row: exp2(s - top) and, weighted by it, dP.
struct RowSums {
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {}, weighted[2] = {};

  __device__ void raise(int half, float to) {
    // Nothing but -infinity so far, as in a lane whose columns are padding: exp2(-infinity - 0) is the 0 that is meant.
    const float factor = exp2_approx(top[half] - (to == -INFINITY ? 0.0f : to));
    top[half] = to;
    sum[half] *= factor;
    weighted[half] *= factor;
  }
  __device__ void add(const float (&s)[2][4], const float (&dp)[2][4], float scale) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = 2 * half;
      raise(half, fmaxf(top[half], scale * fmaxf(fmaxf(s[0][i], s[0][i + 1]), fmaxf(s[1][i], s[1][i + 1]))));
      const float base = top[half] == -INFINITY ? 0.0f : top[half];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float p = exp2_approx(fmaf(s[j / 2][i + j % 2], scale, -base));
        sum[half] += p;
        weighted[half] = fmaf(p, dp[j / 2][i + j % 2], weighted[half]);
      }
    }
  }
  /// Joins the four lanes of a row.
  __device__ void finish(float (&lse)[2], float (&delta)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      raise(half, warp_reduce<4>(top[half], Max{}));
      const float all = warp_reduce<4>(sum[half], Sum{});
      lse[half] = top[half] + kLog2E * std::log(all);
      delta[half] = warp_reduce<4>(weighted[half], Sum{}) / all;
    }
  }
};

/// One half of a 16 x head fragment of rows in global memory, beginning at x: the layout of load_left.
template <int head>
__device__ inline float dot_rows(const uint32_t (&a)[head / 16][4], int half, const bf16* x) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < head / 16; ++i) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float pair[2];
      load_pack(x + 16 * i + 8 * side + threadIdx.x % 4 * 2, pair);
      const uint32_t word = a[i][half + 2 * side];
      sum = fmaf(scalar::float_of(word << 16), pair[0], sum);
      sum = fmaf(scalar::float_of(word & 0xffff0000u), pair[1], sum);
    }
  }
  return warp_reduce<4>(sum, Sum{});
}

/// lse and delta of the warp's queries, and delta for the other pass, from what the forward pass kept.
template <int head, class Seen, class Place>
__device__ inline void read_row_statistics(Queries<head>& x, const Problem<Seen>& p, const Share& share, Place place, int token) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = token + threadIdx.x % kWarp / 4 + 8 * half, row = min(at, p.extent.tokens - 1);
    x.lse[half] = kLog2E * p.lse[share.line + row];
    x.delta[half] = dot_rows<head>(x.d_o, half, p.o.values + place[row] * p.o.stride + share.column);
    if (threadIdx.x % 4 == 0 && at < p.extent.tokens) p.delta[share.line + at] = x.delta[half];
  }
}
/// The same from the sums over all keys.
template <int head, class Seen>
__device__ inline void finish_row_statistics(Queries<head>& x, RowSums& sums, const Problem<Seen>& p, const Share& share, int token) {
  sums.finish(x.lse, x.delta);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = token + threadIdx.x % kWarp / 4 + 8 * half;
    if (threadIdx.x % 4 != 0 || at >= p.extent.tokens) continue;
    p.lse[share.line + at] = kLn2 * x.lse[half];
    p.delta[share.line + at] = x.delta[half];
  }
}

/// 16 keys from token `key` on: their share of the sums, or of dq / scale. `query` is the warp's first.
template <int head, bool summing, class Seen>
__device__ inline void meet_keys(Queries<head>& x, RowSums& sums, const bf16* k, const Problem<Seen>& p, int query, int key) {
  float s[2][4] = {}, dp[2][4] = {};
  multiply_transposed<head>(s, x.q, k);
  multiply_transposed<head>(dp, x.d_o, k + kSecond<head>);
  const float scale = p.seen.template add<false>(s, p.scale, p.extent, query, key);
  mask_columns(s, p.extent.tokens - key);
  if constexpr (summing) {
    sums.add(s, dp, scale);
  } else {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] = exp2_approx(fmaf(s[j][i], scale, -x.lse[i / 2])) * (dp[j][i] - x.delta[i / 2]);
    }
    uint32_t ds[4];
    round_to_left(ds, s[0], s[1]);
    multiply<head>(x.dq, ds, k);
  }
}
template <int head, bool summing, class Seen>
__device__ inline void meet_chunk(Queries<head>& x, RowSums& sums, const bf16* k, const Problem<Seen>& p, int query, int c) {
  for (int from = 0; from < p.extent.rows(c); from += kTile)
    meet_keys<head, summing>(x, sums, k + from * kPitch<head>, p, query, c * kChunk + from);
}

template <int head, bool exact, class Seen>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocks<head>) queries_kernel(Problem<Seen> p) {
  const Extent& e = p.extent;
  const Share share = share_of<head>(e);
  const int warp = threadIdx.x / kWarp, rows = blockDim.x / kWarp * kTile, chunks = e.chunks(), visits = exact ? chunks : 2 * chunks;
  const auto place = p.seen.open(e, share);
  bf16* const q = dynamic_shared<bf16>() + p.seen.shared_elements(e);
  bf16* const d_o = q + rows * kPitch<head>;
  bf16* const slots = d_o + rows * kPitch<head>;
  // A visit is a chunk of keys in shared memory; where all chunks fit, the second round finds them there.
  const auto load_visit = [&](int visit) {
    if (visit < chunks || e.slots < chunks) {
      const int c = visit % chunks, rows = e.rows(c);
      bf16* const k = slots + visit % e.slots * kSlot<head>;
      load_operands<head>(k, p.k, p.v, kSecond<head>, place.from(c * kChunk), share.column, rows, whole_tiles(rows));
    }
    copy_async_commit();
  };
  const int first = share.first * kTile, token = first + warp * kTile;
  load_operand<head>(q, p.q, place.from(first), share.column, e.tokens - first, share.tiles * kTile);
  load_values<head>(d_o, p.d_o, place.from(first), share.column, e.tokens - first, share.tiles * kTile);

  Queries<head> x = {};
  RowSums sums;
  const bool active = warp < share.tiles;
  for (int visit = -1; visit < visits; ++visit) {  // at -1 things are loaded, no more
    if (visit + 1 < visits) load_visit(visit + 1);
    if (active && visit >= 0) {
      const bf16* const k = slots + visit % e.slots * kSlot<head>;
      if (!exact && visit < chunks)
        meet_chunk<head, true>(x, sums, k, p, token, visit % chunks);
      else
        meet_chunk<head, false>(x, sums, k, p, token, visit % chunks);
      if (!exact && visit + 1 == chunks) finish_row_statistics(x, sums, p, share, token);
    }
    copy_async_wait<0>();
    __syncthreads();
    if (active && visit < 0) {
      load_left<head>(x.q, q + warp * kTile * kPitch<head>);
      load_left<head>(x.d_o, d_o + warp * kTile * kPitch<head>);
      if (exact) read_row_statistics(x, p, share, place, token);
    }
  }
  if (!active) return;
  const float factor[2] = {p.scale * kLn2, p.scale * kLn2};
  store_product<head>(x.dq, factor, q + warp * kTile * kPitch<head>, p.dq, place.from(token), share.column, e.tokens - token);
}

// --- dk, dv -----------------------------------------------------------------------------------------------------------------------

/// 16 keys.
template <int head>
struct Keys {
  uint32_t k[head / 16][4], v[head / 16][4];
  float dk[head / 8][4], dv[head / 8][4];
};

/// 16 queries from token `query` on, with (lse, delta) of each: their share of dk / scale and dv. `key` is the warp's first.
template <int head, class Seen>
__device__ inline void meet_queries(Keys<head>& x, const bf16* q, const float2* statistics, const Problem<Seen>& p, int key, int query) {
  const bf16* d_o = q + kSecond<head>;
  float s[2][4] = {}, dp[2][4] = {};
  multiply_transposed<head>(s, x.k, q);
  multiply_transposed<head>(dp, x.v, d_o);
  const float scale = p.seen.template add<true>(s, p.scale, p.extent, key, query);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float of[4];  // lse and delta of this lane's two columns
    load_pack(&statistics[8 * j + threadIdx.x % 4 * 2].x, of);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[j][i] = exp2_approx(fmaf(s[j][i], scale, -of[i % 2 * 2]));
      dp[j][i] = s[j][i] * (dp[j][i] - of[i % 2 * 2 + 1]);
    }
  }
  uint32_t left[4];
  round_to_left(left, s[0], s[1]);
  multiply<head>(x.dv, left, d_o);
  round_to_left(left, dp[0], dp[1]);
  multiply<head>(x.dk, left, q);
}

template <int head, class Seen>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocks<head>) keys_kernel(Problem<Seen> p) {
  const Extent& e = p.extent;
  const Share share = share_of<head>(e);
  const int warp = threadIdx.x / kWarp, rows = blockDim.x / kWarp * kTile, chunks = e.chunks();
  const auto place = p.seen.open(e, share);
  float2* const statistics = reinterpret_cast<float2*>(dynamic_shared<bf16>() + p.seen.shared_elements(e));
  bf16* const k = reinterpret_cast<bf16*>(statistics + e.tiles() * kTile);
  bf16* const v = k + rows * kPitch<head>;
  bf16* const slots = v + rows * kPitch<head>;
  const auto load_chunk = [&](int c) {
    const int rows = e.rows(c);
    bf16* const q = slots + c % e.slots * kSlot<head>;
    load_operand<head>(q, p.q, place.from(c * kChunk), share.column, rows, whole_tiles(rows));
    load_values<head>(q + kSecond<head>, p.d_o, place.from(c * kChunk), share.column, rows, whole_tiles(rows));
    copy_async_commit();
  };
  const int first = share.first * kTile, token = first + warp * kTile;
  load_operands<head>(k, p.k, p.v, static_cast<int>(v - k), place.from(first), share.column, e.tokens - first, share.tiles * kTile);
  for (int i = threadIdx.x; i < e.tiles() * kTile; i += blockDim.x) {
    // Queries that are padding: P = exp2(s - infinity) = 0.
    statistics[i] = i < e.tokens ? float2{kLog2E * p.lse[share.line + i], p.delta[share.line + i]} : float2{INFINITY, 0.0f};
  }

  Keys<head> x = {};
  const bool active = warp < share.tiles;
  for (int c = -1; c < chunks; ++c) {
    if (c + 1 < chunks) load_chunk(c + 1);
    if (active && c >= 0) {
      const bf16* q = slots + c % e.slots * kSlot<head>;
      const int end = min(e.tokens, (c + 1) * kChunk);
      for (int query = c * kChunk; query < end; query += kTile, q += kTile * kPitch<head>)
        meet_queries<head>(x, q, statistics + query, p, token, query);
    }
    copy_async_wait<0>();
    __syncthreads();
    if (active && c < 0) {
      load_left<head>(x.k, k + warp * kTile * kPitch<head>);
      load_left<head>(x.v, v + warp * kTile * kPitch<head>);
    }
  }
  if (!active) return;
  const float factor[2] = {p.scale * kLn2, p.scale * kLn2}, one[2] = {1, 1};
  store_product<head>(x.dk, factor, k + warp * kTile * kPitch<head>, p.dk, place.from(token), share.column, e.tokens - token);
  store_product<head>(x.dv, one, v + warp * kTile * kPitch<head>, p.dv, place.from(token), share.column, e.tokens - token);
}

template <int head, class Seen>
void start(const Sizes& n, Problem<Seen> p, bool exact) {
  const auto bytes = [&](const Deal& d) {
    return (p.seen.shared_elements(d.extent) + 2 * d.extent.most_tiles() * kTile * kPitch<head> + slot_elements<head>(d.extent)) *
           sizeof(bf16);
  };
  const Deal by_keys = deal(n, kWarps, 2);
  Deal by_queries = deal(n, kWarps, exact ? 2 : static_cast<int>(n.length));
  if (bytes(by_queries) > kSharedBytes) by_queries = by_keys;  // the keys then come twice
  const dim3 block(by_keys.extent.most_tiles() * kWarp);
  p.extent = by_queries.extent;
  launch("fused_attention_grad (dq)", exact ? &queries_kernel<head, true, Seen> : &queries_kernel<head, false, Seen>, dim3(by_queries.grid),
         block, bytes(by_queries), p);
  p.extent = by_keys.extent;
  const size_t rows = p.extent.tiles() * kTile * sizeof(float2);
  launch("fused_attention_grad (dk, dv)", &keys_kernel<head, Seen>, dim3(by_keys.grid), block, bytes(by_keys) + rows, p);
}

// --- the table of biases ------------------------------------------------------------------------------------------------------------

/// The gradient of the biases of 16 queries and a chunk of keys, summed over the windows of a part in their order: sums [parts, heads, n,
/// n]. One warp each; blockIdx.x runs over row tiles and chunks within heads within parts.
template <int head>
__global__ void __launch_bounds__(kWarp) bias_kernel(Problem<InWindows> p, int sequences, int parts, float* sums) {
  const Extent& e = p.extent;
  const int tiles = e.tiles(), chunks = e.chunks();
  const int tile = blockIdx.x % tiles, c = blockIdx.x / tiles % chunks, h = blockIdx.x / (tiles * chunks) % e.heads;
  const int part = blockIdx.x / (tiles * chunks * e.heads);
  const int query = tile * kTile, key = c * kChunk, rows = e.rows(c);
  bf16* const q = dynamic_shared<bf16>() + p.seen.shared_elements(e);
  bf16* const d_o = q + kTile * kPitch<head>;
  bf16* const k = d_o + kTile * kPitch<head>;
  float sum[kChunk / 8][4] = {};
  const int end = static_cast<int>(int64_t{part + 1} * sequences / parts);
  for (int sequence = static_cast<int>(int64_t{part} * sequences / parts); sequence < end; ++sequence) {
    const Share share{sequence, (sequence * e.heads + h) * e.tokens, h * head, 0, tiles};
    __syncthreads();  // the previous window may still be read
    const auto place = p.seen.open(e, share);
    load_operand<head>(q, p.q, place.from(query), share.column, e.tokens - query, kTile);
    load_values<head>(d_o, p.d_o, place.from(query), share.column, e.tokens - query, kTile);
    load_operand<head>(k, p.k, place.from(key), share.column, rows, whole_tiles(rows));
    load_operand<head>(k + kSecond<head>, p.v, place.from(key), share.column, rows, whole_tiles(rows));
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    Queries<head> x = {};
    load_left<head>(x.q, q);
    load_left<head>(x.d_o, d_o);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = share.line + min(query + static_cast<int>(threadIdx.x) / 4 + 8 * half, e.tokens - 1);
      x.lse[half] = kLog2E * p.lse[at];
      x.delta[half] = p.delta[at];
    }
#pragma unroll
    for (int g = 0; g < kChunk / kTile; ++g) {
      if (g * kTile >= rows) break;
      float s[2][4] = {}, dp[2][4] = {};
      multiply_transposed<head>(s, x.q, k + g * kTile * kPitch<head>);
      multiply_transposed<head>(dp, x.d_o, k + kSecond<head> + g * kTile * kPitch<head>);
      p.seen.template add<false>(s, p.scale, e, query, key + g * kTile);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[2 * g + j][i] += exp2_approx(s[j][i] - x.lse[i / 2]) * (dp[j][i] - x.delta[i / 2]);
      }
    }
  }
  float* const to = sums + (static_cast<int64_t>(part) * e.heads + h) * e.tokens * e.tokens;
#pragma unroll
  for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = query + static_cast<int>(threadIdx.x) / 4 + i / 2 * 8,
                column = key + 8 * j + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
      if (row < e.tokens && column < e.tokens) to[row * e.tokens + column] = sum[j][i];
    }
  }
}

/// The rows' statistics must be there.
template <int head>
void start_bias(const Sizes& n, Problem<InWindows> p, const WindowBias& windows) {
  p.extent = deal(n, kWarps, 2).extent;
  const int64_t across = p.extent.tiles() * p.extent.chunks() * n.heads, pairs = n.heads * n.length * n.length;
  constexpr int64_t kWarpsToFill = 132 * 16;  // a large GPU, with 16 warps on each multiprocessor
  const int64_t parts = std::clamp<int64_t>(kWarpsToFill / across, 1, n.sequences);
  const Tensor sums = Tensor::empty({parts, pairs}, DType::f32, windows.d_table.device());
  const Tensor sum = Tensor::empty({n.heads, n.length, n.length}, DType::f32, windows.d_table.device());
  const int elements = p.seen.shared_elements(p.extent) + 2 * kTile * kPitch<head> + kSlot<head>;
  launch("fused_attention_grad (biases)", &bias_kernel<head>, dim3(static_cast<unsigned>(across * parts)), dim3(kWarp),
         elements * sizeof(bf16), p, static_cast<int>(n.sequences), static_cast<int>(parts), sums.data<float>());
  sum_rows(sums, sum.reshape({pairs}), false);
  expand_bias_grad(sum, windows.windows, 1, windows.d_table, windows.accumulate);
}

}  // namespace

void fused_attention_grad(const Tensor& d_o, const AttentionOperand& q, const AttentionOperand& k, const AttentionOperand& v,
                          const Tensor& o, const Tensor& lse, int64_t heads, double scale, const Tensor& dq, const Tensor& dk,
                          const Tensor& dv, const WindowBias& windows) {
  const Sizes n = sizes_of(d_o, heads, scale, windows);
  if (lse.defined()) n.check_lines(lse, "lse");
  if (d_o.numel() == 0) {
    if (windows.d_table.defined() && !windows.accumulate) fill(windows.d_table, 0);
    return;
  }
  const bool exact = o.defined() && lse.defined();
  const auto lines = [&] { return Tensor::empty({n.sequences, heads, n.length}, DType::f32, d_o.device()); };
  const Tensor rows = exact ? lse : lines(), delta = lines();
  const auto problem = [&](auto seen) {
    return Problem<decltype(seen)>{{},
                                   seen,
                                   n.operand(q, "q"),
                                   n.operand(k, "k"),
                                   n.operand(v, "v"),
                                   exact ? n.operand(o, "o") : Operand(),
                                   n.operand(d_o, "d_o"),
                                   n.operand(dq, "dq"),
                                   n.operand(dk, "dk"),
                                   n.operand(dv, "dv"),
                                   rows.data<float>(),
                                   delta.data<float>(),
                                   static_cast<float>(scale * kLog2E)};
  };
  if (windows.defined()) {
    const auto p = problem(InWindows{windows.windows, windows.table.data<float>()});
    start<32>(n, p, exact);
    if (windows.d_table.defined()) start_bias<32>(n, p, windows);
  } else if (n.head == 64) {
    start<64>(n, problem(NoWindows{}), exact);
  } else {
    start<32>(n, problem(NoWindows{}), exact);
  }
}

}  // namespace mesa::kernels::cuda
