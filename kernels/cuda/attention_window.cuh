// How the fused attention sees its sequences: whole images, whose tokens lie one after the other, or windows of a grid, with a bias by
// relative position. What a block needs of its window lies in shared memory: the row of each token, its position and region, and the head's
// biases.
#pragma once
#include "attention_tiles.cuh"

namespace mesa::kernels::cuda {
namespace {

/// The attention of whole images has no such thing.
struct NoWindows {
  static constexpr bool windowed = false;
  __device__ Consecutive open(const Extent& e, const Share& share) const { return {share.sequence * e.own}; }
  __device__ Consecutive met(const Extent& e, const Share& share) const { return {share.sequence * e.met}; }
  MESA_HD int shared_elements(const Extent&) const { return 0; }
  template <bool transposed, int n>
  __device__ float add(float (&)[n][4], float scale, const Extent&, int, int) const {
    return scale;
  }
};

struct InWindows {
  static constexpr bool windowed = true;
  Windows w;
  const float* table;  ///< [distances, heads]

  /// Positions and regions of padding are those of the last token.
  struct Token {
    int position, region;
  };
  MESA_HD static int padded(const Extent& e) { return whole_tiles(e.own); }
  /// In units of bf16, so that tiles may follow at multiples of 16 bytes.
  MESA_HD int shared_elements(const Extent& e) const { return (3 * padded(e) + (w.distances() + 3) / 4 * 4) * 2; }

  __device__ static Token* tokens() { return dynamic_shared<Token>(); }
  __device__ static int* rows(const Extent& e) { return reinterpret_cast<int*>(tokens() + padded(e)); }
  __device__ static float* biases(const Extent& e) { return reinterpret_cast<float*>(rows(e) + padded(e)); }

  /// Where the block's own tokens are, and those that they meet: the same. The first fills shared memory; all threads of the block take
  /// part. `share.sequence` may be another one each time.
  __device__ Listed open(const Extent& e, const Share& share) const {
    const int image = share.sequence / w.count(), window = share.sequence - image * w.count();
    for (int t = threadIdx.x; t < padded(e); t += blockDim.x) {
      const int place = min(t, e.own - 1);
      tokens()[t] = {w.position(place), w.region(window, place)};
      rows(e)[t] = image * static_cast<int>(w.tokens()) + w.token(window, place);
    }
    const int head = share.line % e.heads;
    for (int i = threadIdx.x; i < w.distances(); i += blockDim.x) biases(e)[i] = kLog2E * table[i * e.heads + head];
    __syncthreads();
    return {rows(e)};
  }
  __device__ Listed met(const Extent& e, const Share&) const { return {rows(e)}; }
  /// s <- scale s + bias in units of log2, -infinity where two tokens do not see each other: rows from token `row` on, columns from
  /// `column`. The rows are queries, or keys if `transposed`. Returns the factor that is left to apply.
  template <bool transposed, int n>
  __device__ float add(float (&s)[n][4], float scale, const Extent& e, int row, int column) const {
    const Token low = tokens()[row + threadIdx.x % kWarp / 4], high = tokens()[row + threadIdx.x % kWarp / 4 + 8];
    const float* const bias = biases(e) + w.origin();
#pragma unroll
    for (int j = 0; j < n; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Token other = tokens()[column + 8 * j + threadIdx.x % 4 * 2 + i % 2];
        const Token& own = i < 2 ? low : high;
        const int distance = transposed ? other.position - own.position : own.position - other.position;
        s[j][i] = own.region == other.region ? fmaf(s[j][i], scale, bias[distance]) : -INFINITY;
      }
    }
    return 1;
  }
};

}  // namespace
}  // namespace mesa::kernels::cuda
