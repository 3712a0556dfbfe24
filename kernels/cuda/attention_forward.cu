// o = softmax(scale q k^T) v and lse = log sum_j exp(scale s_j) in one pass over the keys. With maximum m and sum l of a row so far, new
// scores s give m' = max(m, s), o <- exp(m - m') o + exp(s - m') v, and l likewise (Milakov and Gimelshein, 2018; Dao et al., 2022).
// The blocks of a head also write the codes of its q, k and v, each those of its own tokens.
#include "attention_window.cuh"
#include "codec_producer.cuh"
#include "mesa/kernels/attention.h"

namespace mesa::kernels::cuda {
namespace {

inline constexpr int kWarps = 4;

/// Tiles of a warp: two share each fragment of k and v, which halves the traffic of shared memory; narrow heads are bound by global memory.
template <int head>
inline constexpr int kTilesPerWarp = head == 64 ? 2 : 1;

template <class Seen>
struct Problem {
  Extent extent;
  Seen seen;  ///< NoWindows or InWindows
  Operand q, k, v, o;
  float* lse;
  float scale;  ///< times log2 e: exponentials are powers of two
  Producer codes[3];
};

/// `tiles` of an operand of so many tokens, which are this block's: straight from global memory, where the products will find them in the
/// cache.
template <int head, class Place>
__device__ inline void write_codes(const Producer& to, const Operand& x, const Extent& e, const Share& share, const Run& tiles, int tokens,
                                   Place place) {
  constexpr int lanes = head / kUnit;
  const int from = tiles.first * kTile, rows = min(tiles.count * kTile, tokens - from);
  const uint32_t group = to.group_at(share.column);
  const GroupScale scale = to.scale_of(group);
  Noted noted;
  uint32_t saturated = 0, nonfinite = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * lanes; i += blockDim.x) {
    const int64_t row = place[from + i / lanes];
    const int column = share.column + i % lanes * kUnit;
    float v[kUnit];
    load_pack(x.values + row * x.stride + column, v);
    noted.add(v, scale, saturated, nonfinite);
    to.write(row * (e.heads * lanes) + column / kUnit, v, scale);
  }
  const float lo = warp_reduce(noted.lo, Minimum{}), hi = warp_reduce(noted.hi, Maximum{});
  if (threadIdx.x % kWarp == 0) to.watch.put_directly(group, lo, hi);
  if (to.watch.counts && __any_sync(kFullMask, saturated + nonfinite > 0)) {
    saturated = warp_reduce(saturated, Sum{}), nonfinite = warp_reduce(nonfinite, Sum{});
    if (threadIdx.x % kWarp == 0) to.watch.count(saturated, nonfinite);
  }
}
template <int head, class Seen, class Place>
__device__ inline void write_codes(const Problem<Seen>& p, const Share& share, Place queries, Place keys) {
  const Extent& e = p.extent;
  const Run of_keys = run_of(tiles_of(e.met), share.part, e.parts);
  if (p.codes[0].codes) write_codes<head>(p.codes[0], p.q, e, share, {share.first, share.tiles}, e.own, queries);
  if (p.codes[1].codes) write_codes<head>(p.codes[1], p.k, e, share, of_keys, e.met, keys);
  if (p.codes[2].codes) write_codes<head>(p.codes[2], p.v, e, share, of_keys, e.met, keys);
}
/// When all blocks have written theirs, the last one takes the ranges into the estimates.
template <class Seen>
__device__ inline void finish_codes(const Problem<Seen>& p) {
  const int first = p.codes[0].codes ? 0 : p.codes[1].codes ? 1 : 2;
  if (!p.codes[first].codes || !p.codes[first].watch.is_last_block()) return;
  for (int i = first; i < 3; ++i)
    if (p.codes[i].codes) p.codes[i].watch.write_all();
}

/// 16 queries. Scores are in units of log2 from here on.
template <int head>
struct Queries {
  uint32_t q[head / 16][4];
  float o[head / 8][4];
  float top[2], sum[2];  ///< of each half's row; the sum is of this lane's columns
};

/// A row keeps its old maximum until a score exceeds it by this much: rescaling is rare and exp2(s - m) <= 256 costs no precision.
inline constexpr float kSlack = 8;

/// s <- exp2(scale s - top), and the sums. A window may hide all keys so far, which the top -infinity tells.
template <bool hiding, int head, int n>
__device__ inline void exponentials(float (&s)[n][4], Queries<head>& x, float scale) {
  float top[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    top[half] = s[0][2 * half];
#pragma unroll
    for (int j = 0; j < n; ++j) top[half] = fmaxf(top[half], fmaxf(s[j][2 * half], s[j][2 * half + 1]));
    top[half] = scale * warp_reduce<4>(top[half], Max{});
  }
  if (__any_sync(kFullMask, top[0] > x.top[0] + kSlack || top[1] > x.top[1] + kSlack)) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = fmaxf(top[half], x.top[half]);
      const float factor = hiding && top[half] == -INFINITY ? 0.0f : exp2_approx(x.top[half] - top[half]);
      x.top[half] = top[half];
      x.sum[half] *= factor;
#pragma unroll
      for (int j = 0; j < head / 8; ++j) {
        x.o[j][2 * half] *= factor;
        x.o[j][2 * half + 1] *= factor;
      }
    }
  }
#pragma unroll
  for (int j = 0; j < n; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[j][i] = exp2_approx(fmaf(s[j][i], scale, hiding && x.top[i / 2] == -INFINITY ? 0.0f : -x.top[i / 2]));
      x.sum[i / 2] += s[j][i];
    }
  }
}

/// What scores of a warp's queries are made of: `row` is the token of its first query, `step` from one of its tiles to the next.
template <class Seen>
struct Scores {
  const Extent& extent;
  const Seen& seen;
  float scale;
  int row, step;
};

/// The first `active` tiles of x meet `groups` times 16 keys from token `key` on.
template <int active, int groups, int head, int tiles, class Seen>
__device__ inline void attend(Queries<head> (&x)[tiles], const bf16* k, int key, const Scores<Seen>& of) {
  const bf16* v = k + kSecond<head>;
  float s[active][2 * groups][4] = {};
#pragma unroll
  for (int g = 0; g < groups; ++g) {
#pragma unroll
    for (int i = 0; i < head / 16; ++i) {
      uint32_t b[4];
      load_right_transposed<head>(b, k + g * kTile * kPitch<head>, 16 * i);
#pragma unroll
      for (int t = 0; t < active; ++t) multiply_pair(s[t][2 * g], s[t][2 * g + 1], x[t].q[i], b);
    }
  }
#pragma unroll
  for (int t = 0; t < active; ++t) {
    const float scale = of.seen.template add<false>(s[t], of.scale, of.extent, of.row + t * of.step, key);
    mask_columns(s[t], of.extent.met - key);
    exponentials<Seen::windowed>(s[t], x[t], scale);
  }
#pragma unroll
  for (int g = 0; g < groups; ++g) {
    uint32_t p[active][4];
#pragma unroll
    for (int t = 0; t < active; ++t) round_to_left(p[t], s[t][2 * g], s[t][2 * g + 1]);
#pragma unroll
    for (int i = 0; i < head / 16; ++i) {
      uint32_t b[4];
      load_right<head>(b, v + g * kTile * kPitch<head>, 16 * i);
#pragma unroll
      for (int t = 0; t < active; ++t) multiply_pair(x[t].o[2 * i], x[t].o[2 * i + 1], p[t], b);
    }
  }
}

/// Chunk c of the keys, 32 by 32 (more scores at once would not fit the registers), the last 16 alone if they are.
template <int active, int head, int tiles, class Seen>
__device__ inline void attend_chunk(Queries<head> (&x)[tiles], const bf16* k, int c, const Scores<Seen>& of) {
  const int rows = of.extent.rows(c);
#pragma unroll 1
  for (int from = 0; from < rows; from += 2 * kTile) {
    if (rows - from > kTile)
      attend<active, 2>(x, k + from * kPitch<head>, c * kChunk + from, of);
    else
      attend<active, 1>(x, k + from * kPitch<head>, c * kChunk + from, of);
  }
}

/// Blocks of a multiprocessor: as many as leave each thread the registers it needs.
template <int head>
inline constexpr int kBlocks = head == 64 ? 3 : 6;

template <int head, int tiles, bool coded, class Seen>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocks<head>) attention_kernel(Problem<Seen> p) {
  const Extent& e = p.extent;
  const Share share = share_of<head>(e);
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp, chunks = e.chunks();
  const auto place = p.seen.open(e, share), keys = p.seen.met(e, share);
  bf16* const q = dynamic_shared<bf16>() + p.seen.shared_elements(e);
  bf16* const slots = q + e.most_tiles() * kTile * kPitch<head>;
  const auto load_chunk = [&](int c) {
    const int rows = e.rows(c);
    bf16* const k = slots + c % e.slots * kSlot<head>;
    load_values<head>(k, p.k, keys.from(c * kChunk), share.column, rows, whole_tiles(rows));
    load_values<head>(k + kSecond<head>, p.v, keys.from(c * kChunk), share.column, rows, whole_tiles(rows));
    copy_async_commit();
  };
  if constexpr (coded) write_codes<head>(p, share, place, keys);
  const int own = share.first * kTile;  // the block's first query
  load_values<head>(q, p.q, place.from(own), share.column, e.own - own, share.tiles * kTile);

  // Tile warp + t warps of the share is tile t of the warp: no warp has two more than another.
  Queries<head> x[tiles] = {};
  const int active = share.tiles <= warp ? 0 : (share.tiles - warp - 1) / warps + 1;
  const Scores<Seen> scores{e, p.seen, p.scale, own + warp * kTile, warps * kTile};
  for (int c = -1; c < chunks; ++c) {  // at -1 things are loaded, no more
    if (c + 1 < chunks) load_chunk(c + 1);
    if (c >= 0) {
      const bf16* const k = slots + c % e.slots * kSlot<head>;
      if (active == tiles)
        attend_chunk<tiles>(x, k, c, scores);
      else if (active == 1)
        attend_chunk<1>(x, k, c, scores);
    }
    copy_async_wait<0>();
    __syncthreads();
    if (c >= 0) continue;
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
      x[t].top[0] = x[t].top[1] = -INFINITY;
      if (t < active) load_left<head>(x[t].q, q + (warp + t * warps) * kTile * kPitch<head>);
    }
  }

#pragma unroll
  for (int t = 0; t < tiles; ++t) {
    if (t >= active) break;
    const int tile = warp + t * warps, token = own + tile * kTile;
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = warp_reduce<4>(x[t].sum[half], Sum{});
      const int at = token + threadIdx.x % kWarp / 4 + 8 * half;
      inverse[half] = 1.0f / sum;
      if (threadIdx.x % 4 == 0 && at < e.own) p.lse[share.line * e.own + at] = kLn2 * x[t].top[half] + std::log(sum);
    }
    store_product<head>(x[t].o, inverse, q + tile * kTile * kPitch<head>, p.o, place.from(token), share.column, e.own - token);
  }
  if constexpr (coded) finish_codes(p);
}

template <int head, class Seen>
void start(const Sizes& n, Problem<Seen> p, bool coded) {
  constexpr int tiles = kTilesPerWarp<head>;
  const Deal d = by_queries(n, kWarps * tiles, 2);
  p.extent = d.extent;
  const int warps = std::min(d.extent.most_tiles(), kWarps);
  const int elements = p.seen.shared_elements(d.extent) + d.extent.most_tiles() * kTile * kPitch<head> + slot_elements<head>(d.extent);
  launch("fused_attention", coded ? &attention_kernel<head, tiles, true, Seen> : &attention_kernel<head, tiles, false, Seen>, dim3(d.grid),
         dim3(warps * kWarp), elements * sizeof(bf16), p);
}

}  // namespace

void fused_attention(const Tensor& q, const Tensor& k, const Tensor& v, int64_t heads, double scale, const Tensor& o, const Tensor& lse,
                     const QkvCodes& codes, const WindowBias& windows) {
  const Sizes n = sizes_of(q, k, heads, scale, windows);
  n.check_lines(lse, "lse");
  Producer producers[3];
  const Tensor* const rows[] = {&q, &k, &v};
  std::array<WatchedGroups, 3> groups;  // live until the launch
  for (int i = 0; i < 3; ++i) {
    if (!codes[i].defined()) continue;
    if (q.numel() == 0 || !can_produce(codes[i], rows[i]->numel(), n.channels, kUnit) ||
        (codes[i].layout.groups > 1 && codes[i].layout.inner % n.head != 0)) {
      encode(*rows[i], codes[i]);
      continue;
    }
    groups[i] = WatchedGroups(codes[i], i);
    producers[i] = producer_of(codes[i], rows[i]->numel(), groups[i]);
  }
  if (q.numel() == 0) return;
  const bool coded = producers[0].codes || producers[1].codes || producers[2].codes;
  const auto problem = [&](auto seen) {
    return Problem<decltype(seen)>{{},
                                   seen,
                                   n.queries({q, {}}, "q"),
                                   n.keys({k, {}}, "k"),
                                   n.keys({v, {}}, "v"),
                                   n.queries({o, {}}, "o"),
                                   lse.data<float>(),
                                   static_cast<float>(scale * kLog2E),
                                   {producers[0], producers[1], producers[2]}};
  };
  if (windows.defined())
    start<32>(n, problem(InWindows{windows.windows, windows.table.data<float>()}), coded);
  else if (n.head == 64)
    start<64>(n, problem(NoWindows{}), coded);
  else
    start<32>(n, problem(NoWindows{}), coded);
}

}  // namespace mesa::kernels::cuda
