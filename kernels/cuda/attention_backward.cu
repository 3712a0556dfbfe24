// With P = exp(scale q k^T - lse), dP = dO v^T and dS = P (dP - delta): dv = P^T dO, dq = scale dS k, dk = scale dS^T q (Dao et al., 2022).
// Two passes, so that every sum has one owner and a fixed order: queries meet all keys for dq, then keys meet all queries for dk and dv.
// The first also finds delta = sum_d dO o. Without o and lse it first meets the keys once more, for lse and delta = sum_j P dP. Where keys
// are few, several blocks meet the queries of each in turns, and their sums are added up in order.
#include "attention_gradient.cuh"
#include "mesa/kernels/elementwise.h"

namespace mesa::kernels::cuda {
namespace {

/// Blocks of a multiprocessor: as many as leave each thread the registers it needs.
template <int head>
inline constexpr int kBlocks = head == 64 ? 2 : 3;
/// What a block may use on every GPU from compute capability 8.0 on.
inline constexpr size_t kSharedBytes = 99 << 10;

// --- sums of columns --------------------------------------------------------------------------------------------------------------

/// The warp's tile <- the sums of the first `valid` rows that store_product left there, as [head] floats.
template <int head>
__device__ inline void sum_tile(bf16* tile, int valid) {
  constexpr int N = head / kWarp;
  const int column = threadIdx.x % kWarp * N;
  float sum[N] = {};
  for (int r = 0; r < min(valid, kTile); ++r) {
    float x[N];
    load_pack(tile + r * kPitch<head> + column, x);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += x[i];
  }
  __syncwarp();  // the tile is read
  store_pack(reinterpret_cast<float*>(tile) + column, sum);
}
/// The block's row of sums of dq, dk or dv (`which`) <- those of its warps' tiles. All threads of the block must call it.
template <int head, class Seen>
__device__ inline void store_sums(const bf16* tiles, const Problem<Seen>& p, const Share& share, int which) {
  const int64_t channels = p.extent.heads * head, row = share.sequence * int64_t{p.extent.parts} + share.part;
  for (int c = threadIdx.x; c < head; c += blockDim.x) {
    float sum = 0;
    for (int t = 0; t < share.tiles; ++t) sum += reinterpret_cast<const float*>(tiles + t * kTile * kPitch<head>)[c];
    p.sums[(3 * row + which) * channels + share.column + c] = sum;
  }
}

// --- dq ---------------------------------------------------------------------------------------------------------------------------

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
    const int at = token + threadIdx.x % kWarp / 4 + 8 * half, row = min(at, p.extent.own - 1);
    x.lse[half] = kLog2E * p.lse[share.line * p.extent.own + row];
    x.delta[half] = dot_rows<head>(x.d_o, half, p.o.values + place[row] * p.o.stride + share.column);
    if (threadIdx.x % 4 == 0 && at < p.extent.own) p.delta[share.line * p.extent.own + at] = x.delta[half];
  }
}
/// The same from the sums over all keys.
template <int head, class Seen>
__device__ inline void finish_row_statistics(Queries<head>& x, RowSums& sums, const Problem<Seen>& p, const Share& share, int token) {
  sums.finish(x.lse, x.delta);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = token + threadIdx.x % kWarp / 4 + 8 * half;
    if (threadIdx.x % 4 != 0 || at >= p.extent.own) continue;
    p.lse[share.line * p.extent.own + at] = kLn2 * x.lse[half];
    p.delta[share.line * p.extent.own + at] = x.delta[half];
  }
}

/// 16 keys from token `key` on: their share of the sums, or of dq / scale. `query` is the warp's first.
template <int head, bool summing, class Seen>
__device__ inline void meet_keys(Queries<head>& x, RowSums& sums, const bf16* k, const Problem<Seen>& p, int query, int key) {
  float s[2][4] = {}, dp[2][4] = {};
  multiply_transposed<head>(s, x.q, k);
  multiply_transposed<head>(dp, x.d_o, k + kSecond<head>);
  const float scale = p.seen.template add<false>(s, p.scale, p.extent, query, key);
  mask_columns(s, p.extent.met - key);
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
  const auto place = p.seen.open(e, share), keys = p.seen.met(e, share);
  bf16* const q = dynamic_shared<bf16>() + p.seen.shared_elements(e);
  bf16* const d_o = q + rows * kPitch<head>;
  bf16* const slots = d_o + rows * kPitch<head>;
  // A visit is a chunk of keys in shared memory; where all chunks fit, the second round finds them there.
  const auto load_visit = [&](int visit) {
    if (visit < chunks || e.slots < chunks) {
      const int c = visit % chunks, rows = e.rows(c);
      bf16* const k = slots + visit % e.slots * kSlot<head>;
      load_operands<head>(k, p.k, p.v, kSecond<head>, keys.from(c * kChunk), share.column, rows, whole_tiles(rows));
    }
    copy_async_commit();
  };
  const int first = share.first * kTile, token = first + warp * kTile;
  load_operand<head>(q, p.q, place.from(first), share.column, e.own - first, share.tiles * kTile);
  load_values<head>(d_o, p.d_o, place.from(first), share.column, e.own - first, share.tiles * kTile);

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
  if (active) {
    const float factor[2] = {p.scale * kLn2, p.scale * kLn2};
    bf16* const tile = q + warp * kTile * kPitch<head>;
    store_product<head>(x.dq, factor, tile, p.dq, place.from(token), share.column, e.own - token);
    if (p.sums) sum_tile<head>(tile, e.own - token);
  }
  if (!p.sums) return;
  __syncthreads();
  store_sums<head>(q, p, share, 0);
}

// --- dk, dv -----------------------------------------------------------------------------------------------------------------------

/// 16 keys.
template <int head>
struct Keys {
  uint32_t k[head / 16][4], v[head / 16][4];
  float dk[head / 8][4], dv[head / 8][4];
};

/// Of each query of a chunk; infinity and 0 for padding, so that P = exp2(s - infinity) = 0.
struct Statistics {
  float lse[kChunk], delta[kChunk];
};

/// 16 queries from token `query` on, the `at`th of their chunk: their share of dk / scale and dv. `key` is the warp's first.
template <int head, class Seen>
__device__ inline void meet_queries(Keys<head>& x, const bf16* q, const Statistics& of, int at, const Problem<Seen>& p, int key,
                                    int query) {
  const bf16* d_o = q + kSecond<head>;
  float s[2][4] = {}, dp[2][4] = {};
  multiply_transposed<head>(s, x.k, q);
  multiply_transposed<head>(dp, x.v, d_o);
  const float scale = p.seen.template add<true>(s, p.scale, p.extent, key, query);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float lse[2], delta[2];  // of this lane's columns
    load_pack(of.lse + at + 8 * j + threadIdx.x % 4 * 2, lse);
    load_pack(of.delta + at + 8 * j + threadIdx.x % 4 * 2, delta);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[j][i] = exp2_approx(fmaf(s[j][i], scale, -kLog2E * lse[i % 2]));
      dp[j][i] = s[j][i] * (dp[j][i] - delta[i % 2]);
    }
  }
  uint32_t left[4];
  round_to_left(left, s[0], s[1]);
  multiply<head>(x.dv, left, d_o);
  round_to_left(left, dp[0], dp[1]);
  multiply<head>(x.dk, left, q);
}

/// The warp's 16 rows of a sum [sequences, M, C], the first `valid` of them, from element `to` on.
template <int head>
__device__ inline void store_sum(const float (&d)[head / 8][4], float factor, float* to, int64_t channels, int valid) {
  const int row = threadIdx.x % kWarp / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + 8 * half >= valid) continue;
    float* const x = to + (row + 8 * half) * channels + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < head / 8; ++j) {
      const float pair[2] = {factor * d[j][2 * half], factor * d[j][2 * half + 1]};
      store_pack(x + 8 * j, pair);
    }
  }
}

template <int head, class Seen>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocks<head>) keys_kernel(Problem<Seen> p, float* turns) {
  const Extent& e = p.extent;
  const Share share = share_of<head>(e);
  const int warp = threadIdx.x / kWarp, rows = blockDim.x / kWarp * kTile, end = share.chunks.first + share.chunks.count;
  const auto place = p.seen.open(e, share), queries = p.seen.met(e, share);
  Statistics* const statistics = reinterpret_cast<Statistics*>(dynamic_shared<bf16>() + p.seen.shared_elements(e));
  bf16* const k = reinterpret_cast<bf16*>(statistics + e.slots);
  bf16* const v = k + rows * kPitch<head>;
  bf16* const slots = v + rows * kPitch<head>;
  const auto load_chunk = [&](int c) {
    const int rows = e.rows(c);
    bf16* const q = slots + c % e.slots * kSlot<head>;
    load_operand<head>(q, p.q, queries.from(c * kChunk), share.column, rows, whole_tiles(rows));
    load_values<head>(q + kSecond<head>, p.d_o, queries.from(c * kChunk), share.column, rows, whole_tiles(rows));
    Statistics& of = statistics[c % e.slots];
    const int line = share.line * e.met + c * kChunk;
    for (int i = threadIdx.x; i < whole_tiles(rows); i += blockDim.x) {
      if (i < rows)
        copy_async_4(of.lse + i, p.lse + line + i), copy_async_4(of.delta + i, p.delta + line + i);
      else
        of.lse[i] = INFINITY, of.delta[i] = 0;
    }
    copy_async_commit();
  };
  const int first = share.first * kTile, token = first + warp * kTile;
  load_operands<head>(k, p.k, p.v, static_cast<int>(v - k), place.from(first), share.column, e.own - first, share.tiles * kTile);

  Keys<head> x = {};
  const bool active = warp < share.tiles;
  for (int c = share.chunks.first - 1; c < end; ++c) {  // before the first things are loaded, no more
    const bool loading = c < share.chunks.first;
    if (c + 1 < end) load_chunk(c + 1);
    if (active && !loading) {
      const bf16* q = slots + c % e.slots * kSlot<head>;
      for (int at = 0; at < e.rows(c); at += kTile, q += kTile * kPitch<head>)
        meet_queries<head>(x, q, statistics[c % e.slots], at, p, token, c * kChunk + at);
    }
    copy_async_wait<0>();
    __syncthreads();
    if (active && loading) {
      load_left<head>(x.k, k + warp * kTile * kPitch<head>);
      load_left<head>(x.v, v + warp * kTile * kPitch<head>);
    }
  }
  const float factor[2] = {p.scale * kLn2, p.scale * kLn2}, one[2] = {1, 1};
  if (turns) {
    if (!active) return;
    const int64_t channels = e.heads * head, all = static_cast<int64_t>(gridDim.x / (e.parts * e.turns)) * e.own * head;
    float* const to = turns + 2 * share.turn * all + (static_cast<int64_t>(share.sequence) * e.own + token) * channels + share.column;
    store_sum<head>(x.dk, factor[0], to, channels, e.own - token);
    store_sum<head>(x.dv, 1, to + all, channels, e.own - token);
    return;
  }
  if (active) {
    bf16 *const tile_k = k + warp * kTile * kPitch<head>, *const tile_v = v + warp * kTile * kPitch<head>;
    store_product<head>(x.dk, factor, tile_k, p.dk, place.from(token), share.column, e.own - token);
    store_product<head>(x.dv, one, tile_v, p.dv, place.from(token), share.column, e.own - token);
    if (p.sums) sum_tile<head>(tile_k, e.own - token), sum_tile<head>(tile_v, e.own - token);
  }
  if (!p.sums) return;
  __syncthreads();
  store_sums<head>(k, p, share, 1);
  store_sums<head>(v, p, share, 2);
}

size_t threads_of(const Deal& d) { return d.extent.most_tiles() * kWarp; }

template <int head, class Seen>
size_t shared_bytes(const Deal& d, const Seen& seen) {
  return (seen.shared_elements(d.extent) + 2 * d.extent.most_tiles() * kTile * kPitch<head> + slot_elements<head>(d.extent)) * sizeof(bf16);
}

template <int head, class Seen>
void start_queries(const Sizes& n, Problem<Seen> p, bool exact) {
  Deal d = by_queries(n, kWarps, exact ? 2 : static_cast<int>(n.sequence.keys));
  if (shared_bytes<head>(d, p.seen) > kSharedBytes) d = by_queries(n, kWarps, 2);  // the keys then come twice
  p.extent = d.extent;
  launch("fused_attention_grad (dq)", exact ? &queries_kernel<head, true, Seen> : &queries_kernel<head, false, Seen>, dim3(d.grid),
         dim3(threads_of(d)), shared_bytes<head>(d, p.seen), p);
}

template <int head, class Seen>
void start_keys(const Sizes& n, Problem<Seen> p, const Tensor& dk, const Tensor& dv) {
  const Deal d = by_keys(n, kWarps, 2, !Seen::windowed);
  p.extent = d.extent;
  const int64_t turns = d.extent.turns;
  const Tensor sums = turns > 1 ? Tensor::empty({turns, 2, n.batch, n.image.keys, n.channels}, DType::f32, dk.device()) : Tensor();
  launch("fused_attention_grad (dk, dv)", &keys_kernel<head, Seen>, dim3(d.grid), dim3(threads_of(d)),
         shared_bytes<head>(d, p.seen) + d.extent.slots * sizeof(Statistics), p, turns > 1 ? sums.data<float>() : nullptr);
  if (turns == 1) return;
  const Tensor sum = Tensor::empty({2, n.batch, n.image.keys, n.channels}, DType::f32, dk.device());
  sum_rows(sums.reshape({turns, sum.numel()}), sum.reshape({sum.numel()}), false);
  copy(sum.narrow(0, 0, 1).reshape(dk.shape()), dk);
  copy(sum.narrow(0, 1, 1).reshape(dv.shape()), dv);
}

template <int head, class Seen>
void start(const Sizes& n, const Problem<Seen>& p, bool exact, const Tensor& dk, const Tensor& dv) {
  start_queries<head>(n, p, exact);
  start_keys<head>(n, p, dk, dv);
}

}  // namespace

void fused_attention_grad(const Tensor& d_o, const AttentionOperand& q, const AttentionOperand& k, const AttentionOperand& v,
                          const Tensor& o, const Tensor& lse, int64_t heads, double scale, const Tensor& dq, const Tensor& dk,
                          const Tensor& dv, const WindowBias& windows, const Tensor& sums) {
  const Sizes n = sizes_of(d_o, dk, heads, scale, windows);
  if (lse.defined()) n.check_lines(lse, "lse");
  if (sums.defined()) {  // a row for each block of a head, of dk's, too
    const Extent of_q = by_queries(n, kWarps, 2).extent, of_k = by_keys(n, kWarps, 2, !windows.defined()).extent;
    const Shape shape{n.sequences * of_q.parts, 3 * n.channels};
    check(sums.is_contiguous() && sums.shape() == shape && of_k.parts == of_q.parts && of_k.turns == 1, "fused attention: sums of ",
          sums.shape(), ", not ", shape, ", for ", n.image.queries, " queries and ", n.image.keys, " keys");
  }
  if (d_o.numel() == 0) {
    for (const Tensor& d : {dk, dv})  // of no queries
      if (d.numel() > 0) copy(Tensor::zeros(d.shape(), d.dtype(), d.device()), d);
    if (windows.d_table.defined() && !windows.accumulate) fill(windows.d_table, 0);
    return;
  }
  const bool exact = o.defined() && lse.defined();
  const auto lines = [&] { return Tensor::empty({n.sequences, heads, n.sequence.queries}, DType::f32, d_o.device()); };
  const Tensor rows = exact ? lse : lines(), delta = lines();
  const auto problem = [&](auto seen) {
    auto p = problem_of(n, seen, q, k, v, d_o, rows, delta, scale);
    if (exact) p.o = n.queries({o, {}}, "o");
    p.dq = n.queries({dq, {}}, "dq"), p.dk = n.keys({dk, {}}, "dk"), p.dv = n.keys({dv, {}}, "dv");
    if (sums.defined()) p.sums = sums.data<float>();
    return p;
  };
  if (windows.defined()) {
    start<32>(n, problem(InWindows{windows.windows, windows.table.data<float>()}), exact, dk, dv);
    if (windows.d_table.defined()) window_bias_grad(d_o, q, k, v, rows, delta, heads, scale, windows);
  } else if (n.head == 64) {
    start<64>(n, problem(NoWindows{}), exact, dk, dv);
  } else {
    start<32>(n, problem(NoWindows{}), exact, dk, dv);
  }
}

}  // namespace mesa::kernels::cuda
