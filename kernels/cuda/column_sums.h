// The sums of a matrix's columns, a tile of columns for each block: for the gradient of a bias and the mean over tokens.
#pragma once
#include "cuda.h"

namespace mesa::kernels::cuda {
namespace {

inline constexpr int kColumnThreads = 256;

/// How a block covers a tile: some lanes across, N columns each, the others over the rows. A row of a tile is 256 bytes where packs fit.
template <int N>
struct ColumnTile {
  static constexpr int kAcross = N == 1 ? kWarp : 16;
  static constexpr int kRows = kColumnThreads / kAcross;
  static constexpr int kColumns = kAcross * N;
};

/// Thread t < kColumns gets the sum over x[row, begin + t], row < rows, of a matrix with rows of `width` elements; N divides width.
/// First each lane adds every kRows-th row, then the lanes' sums are added in order. All threads of the block must call it.
template <int N, class T>
__device__ inline Acc<T> sum_columns(const T* x, int64_t rows, int64_t width, int64_t begin) {
  using Tile = ColumnTile<N>;
  __shared__ Pack<Acc<T>, N> parts[Tile::kRows][Tile::kAcross];
  const int column = threadIdx.x % Tile::kAcross, lane = threadIdx.x / Tile::kAcross;
  Pack<Acc<T>, N> sum{};
  if (begin + column * N < width) {
    const T* from = x + begin + column * N;
#pragma unroll 4
    for (int64_t row = lane; row < rows; row += Tile::kRows) {
      Acc<T> v[N];
      load_pack(from + row * width, v);
#pragma unroll
      for (int k = 0; k < N; ++k) sum.v[k] += v[k];
    }
  }
  parts[lane][column] = sum;
  __syncthreads();
  Acc<T> total = 0;
  if (threadIdx.x < Tile::kColumns)
    for (int l = 0; l < Tile::kRows; ++l) total += parts[l][threadIdx.x / N].v[threadIdx.x % N];
  return total;
}

}  // namespace
}  // namespace mesa::kernels::cuda
