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

/// How blocks finish the sums of a matrix of few rows, those of chunks: 8 columns each, a sector of memory for a row, so that there are
/// many blocks, whose lanes share the rows.
struct FewColumns {
  static constexpr int kColumns = 8, kLanes = 32, kThreads = kColumns * kLanes;
  static unsigned blocks(int64_t width) { return static_cast<unsigned>((width + kColumns - 1) / kColumns); }
  __device__ static int64_t column() { return static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x % kColumns; }
  __device__ static int lane() { return threadIdx.x / kColumns; }

  template <int n>
  struct Sums {
    double of[n];
  };
  /// The sums over the lanes of a column, in a fixed order, in its lane 0. All threads of the block must call it, once.
  template <int n>
  __device__ static Sums<n> sum(Sums<n> own) {
    constexpr int kWarps = kThreads / kWarp;
    __shared__ double parts[n][kWarps][kColumns];
    const int lane_of_warp = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < n; ++i) {
#pragma unroll
      for (int distance = kColumns; distance < kWarp; distance *= 2) own.of[i] += __shfl_xor_sync(kFullMask, own.of[i], distance);
      if (lane_of_warp < kColumns) parts[i][threadIdx.x / kWarp][lane_of_warp] = own.of[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < n; ++i) {
      own.of[i] = 0;
      for (int w = 0; w < kWarps; ++w) own.of[i] += parts[i][w][threadIdx.x % kColumns];
    }
    return own;
  }
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
