// The warp-level products of the fused attention. A warp owns tiles of 16 rows, whose fragments and sums stay in its registers; the rows of
// the other operand come through shared memory 16 at a time, so that no work is done for padding beyond the next multiple of 16.
// In a 16 x 8 product lane l holds d[0], d[1] at row l / 4, columns 2 (l % 4) and + 1, and d[2], d[3] eight rows below: "half" 0 and 1.
#pragma once
#include "attention_operand.cuh"

namespace mesa::kernels::cuda {
namespace {

inline constexpr int kTile = 16;
/// Rows that are loaded together while the previous ones are worked on: of two operands, whose tiles lie in one slot of shared memory at a
/// distance known to the compiler, which spares registers.
inline constexpr int kChunk = 64;
template <int head>
inline constexpr int kSecond = kChunk* kPitch<head>;
template <int head>
inline constexpr int kSlot = 2 * kSecond<head>;

inline constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

MESA_HD inline int tiles_of(int rows) { return (rows + kTile - 1) / kTile; }
MESA_HD inline int whole_tiles(int rows) { return tiles_of(rows) * kTile; }

/// Consecutive items of many, dealt out.
struct Run {
  int first, count;
};
MESA_HD inline Run run_of(int items, int part, int parts) {
  const int first = part * items / parts;
  return {first, (part + 1) * items / parts - first};
}

/// What all blocks of one launch have in common. In a head of a sequence blocks own tiles of some tokens (queries, say) and meet those of
/// the other kind (keys) by chunks.
struct Extent {
  int own, met;  ///< tokens of a sequence
  int heads;
  int parts;  ///< blocks that share the tiles of a head
  int turns;  ///< blocks that share the chunks of a head
  int slots;  ///< chunks that shared memory holds

  MESA_HD int tiles() const { return tiles_of(own); }
  MESA_HD int most_tiles() const { return (tiles() + parts - 1) / parts; }  ///< of one block
  MESA_HD int chunks() const { return (met + kChunk - 1) / kChunk; }
  /// Rows of chunk c that exist.
  MESA_HD int rows(int c) const { return met - c * kChunk < kChunk ? met - c * kChunk : kChunk; }
};

/// The block's share: tiles of 16 tokens of one head of one sequence, and the chunks that they meet.
struct Share {
  int sequence;  ///< the image, or the window of one
  int line;      ///< which head of which sequence
  int column;    ///< of the head's first channel
  int part, turn;
  int first, tiles;
  Run chunks;
};

template <int head>
__device__ inline Share share_of(const Extent& e) {
  // Parts of a head side by side: they read the same rows.
  const int part = blockIdx.x % e.parts, turn = blockIdx.x / e.parts % e.turns, line = blockIdx.x / e.parts / e.turns;
  const Run tiles = run_of(e.tiles(), part, e.parts);
  return {line / e.heads, line, line % e.heads * head, part, turn, tiles.first, tiles.count, run_of(e.chunks(), turn, e.turns)};
}

/// Elements of shared memory for the slots; where all chunks have one, the last is as short as its chunk.
template <int head>
int slot_elements(const Extent& e) {
  const int spare = e.slots == e.chunks() ? kChunk - whole_tiles(e.rows(e.chunks() - 1)) : 0;
  return e.slots * kSlot<head> - spare * kPitch<head>;
}

/// A large GPU, with 16 warps on each multiprocessor.
inline constexpr int64_t kWarpsToFill = 132 * 16;

/// How the tiles of a head are dealt out evenly to blocks, and where `turning` the chunks, too, if the tiles leave a GPU idle.
struct Deal {
  Extent extent;
  unsigned grid;
};
inline Deal deal(const Sizes& n, int64_t own, int64_t met, int most_tiles, int most_slots, bool turning) {
  constexpr int64_t kLeastChunks = 8;  // less work than that is not worth the sums
  const int64_t heads = n.sequences * n.heads;
  check(heads * (own + met) < int64_t{1} << 31 && std::max(own, met) <= int64_t{1} << 20, "fused attention: ", n.batch, " images of ",
        n.heads, " heads and ", std::max(own, met), " tokens are too many for one launch");
  Extent e{static_cast<int>(own), static_cast<int>(met), static_cast<int>(n.heads), 1, 1, 1};
  e.parts = static_cast<int>(ceil_div(e.tiles(), most_tiles));
  e.slots = std::min(e.chunks(), most_slots);
  if (turning)
    e.turns = static_cast<int>(std::clamp<int64_t>(kWarpsToFill / (heads * e.tiles()), 1, std::max<int64_t>(1, e.chunks() / kLeastChunks)));
  return {e, static_cast<unsigned>(heads * e.parts * e.turns)};
}
inline Deal by_queries(const Sizes& n, int most_tiles, int most_slots) {
  return deal(n, n.sequence.queries, n.sequence.keys, most_tiles, most_slots, false);
}
inline Deal by_keys(const Sizes& n, int most_tiles, int most_slots, bool turning) {
  return deal(n, n.sequence.keys, n.sequence.queries, most_tiles, most_slots, turning);
}

// --- fragments --------------------------------------------------------------------------------------------------------------------

/// The left operand: 16 rows of a tile, columns column..column+15.
template <int head>
__device__ inline void load_left(uint32_t (&a)[4], const bf16* tile, int column) {
  const int lane = threadIdx.x % kWarp;
  ldmatrix_x4(a, tile + lane % 16 * kPitch<head> + column + lane / 16 * 8);
}
template <int head>
__device__ inline void load_left(uint32_t (&a)[head / 16][4], const bf16* tile) {
#pragma unroll
  for (int i = 0; i < head / 16; ++i) load_left<head>(a[i], tile, 16 * i);
}

/// d += a b for 16 columns.
__device__ inline void multiply_pair(float (&left)[4], float (&right)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
  mma_bf16(left, a, low);
  mma_bf16(right, a, high);
}

/// The right operand of a t^T: columns column..column+15 of 16 rows of the tile, which become columns of the product.
template <int head>
__device__ inline void load_right_transposed(uint32_t (&b)[4], const bf16* tile, int column) {
  const int lane = threadIdx.x % kWarp;
  ldmatrix_x4(b, tile + (lane / 16 * 8 + lane % 8) * kPitch<head> + column + lane / 8 % 2 * 8);
}
/// The right operand of p t: the same 16 x 16 elements, columns of the tile being columns of the product.
template <int head>
__device__ inline void load_right(uint32_t (&b)[4], const bf16* tile, int column) {
  const int lane = threadIdx.x % kWarp;
  ldmatrix_x4_transposed(b, tile + lane % 16 * kPitch<head> + column + lane / 16 * 8);
}

/// s [16, 16] += a t^T.
template <int head>
__device__ inline void multiply_transposed(float (&s)[2][4], const uint32_t (&a)[head / 16][4], const bf16* tile) {
#pragma unroll
  for (int i = 0; i < head / 16; ++i) {
    uint32_t b[4];
    load_right_transposed<head>(b, tile, 16 * i);
    multiply_pair(s[0], s[1], a[i], b);
  }
}
/// d [16, head] += p t.
template <int head>
__device__ inline void multiply(float (&d)[head / 8][4], const uint32_t (&p)[4], const bf16* tile) {
#pragma unroll
  for (int i = 0; i < head / 16; ++i) {
    uint32_t b[4];
    load_right<head>(b, tile, 16 * i);
    multiply_pair(d[2 * i], d[2 * i + 1], p, b);
  }
}

/// A 16 x 16 product rounded to bf16 as the left operand of the next.
__device__ inline void round_to_left(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack_bf16(left[0], left[1]);
  a[1] = pack_bf16(left[2], left[3]);
  a[2] = pack_bf16(right[0], right[1]);
  a[3] = pack_bf16(right[2], right[3]);
}

/// Scores of columns from `valid` on count as -infinity: their probability is 0.
template <int n>
__device__ inline void mask_columns(float (&s)[n][4], int valid) {
  if (valid >= 8 * n) return;
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < n; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (8 * j + column + i % 2 >= valid) s[j][i] = -INFINITY;
  }
}

/// Writes factor[half] d, rounded to bf16, to the 16 rows of x at `place`, the first `valid` of them; `tile` is this warp's room.
template <int head, class Place>
__device__ inline void store_product(const float (&d)[head / 8][4], const float (&factor)[2], bf16* tile, const Operand& x, Place place,
                                     int column, int valid) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int j = 0; j < head / 8; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float pair[2] = {factor[half] * d[j][2 * half], factor[half] * d[j][2 * half + 1]};
      store_pack(tile + (lane / 4 + 8 * half) * kPitch<head> + 8 * j + lane % 4 * 2, pair);
    }
  }
  __syncwarp();
  store_rows<head>(tile, x, place, column, valid);
}

}  // namespace
}  // namespace mesa::kernels::cuda
