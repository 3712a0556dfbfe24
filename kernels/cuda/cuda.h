// What the CUDA kernels share: loads and stores of any floating dtype, 16 bytes at a time, reductions over warps and blocks.
// Sources of kernels/cuda are compiled with MESA_ISA=cuda: by nvcc, and for machines without a GPU by the host compiler (tests/emulation).
#pragma once
#include <device_primitives.h>

#include <algorithm>
#include <vector>

#include "mesa/base/random.h"
#include "mesa/kernels/common.h"
#include "mesa/kernels/scalar.h"

namespace mesa::kernels::cuda {
namespace {

inline constexpr int kWarp = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;

template <class T>
__device__ inline Acc<T> load(const T* p) {
  if constexpr (std::is_same_v<T, bf16>)
    return scalar::float_of(static_cast<uint32_t>(p->bits) << 16);
  else
    return *p;
}
template <class T, class V>
__device__ inline void store(T* p, V value) {
  if constexpr (std::is_same_v<T, bf16>)
    p->bits = static_cast<uint16_t>(pack_bf16(static_cast<float>(value), 0.0f));
  else
    *p = static_cast<T>(value);
}

/// N elements that move in one instruction when N sizeof(T) is 4, 8 or 16 and the address is a multiple of it.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T v[N];
};
template <class T, int N>
__device__ inline void load_pack(const T* p, Acc<T> (&x)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(p);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = load(&pack.v[i]);
}
template <class T, int N, class V>
__device__ inline Pack<T, N> pack_of(const V (&x)[N]) {
  Pack<T, N> pack;
  if constexpr (std::is_same_v<T, bf16> && N % 2 == 0) {
    uint32_t words[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) words[i] = pack_bf16(static_cast<float>(x[2 * i]), static_cast<float>(x[2 * i + 1]));
    memcpy(&pack, words, sizeof pack);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) store(&pack.v[i], x[i]);
  }
  return pack;
}
template <class T, int N, class V>
__device__ inline void store_pack(T* p, const V (&x)[N]) {
  *reinterpret_cast<Pack<T, N>*>(p) = pack_of<T>(x);
}

/// True if p may be read in pieces of `bytes`.
inline bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// --- reductions: in a fixed order, so that the same numbers give the same bits ---------------------------------------------------

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
struct Min {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};

/// The reduction over a block of `threads` threads (a multiple of 32, at most 1,024), in every thread. All threads must call it.
template <class T, class F>
__device__ inline T block_reduce(T value, F f, T identity) {
  __shared__ T parts[kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = (blockDim.x + kWarp - 1) / kWarp;
  value = warp_reduce(value, f);
  __syncthreads();  // a previous call may still be read
  if (lane == 0) parts[warp] = value;
  __syncthreads();
  value = lane < warps ? parts[lane] : identity;
  return warp_reduce(value, f);
}

// --- grids -----------------------------------------------------------------------------------------------------------------------

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Blocks for a loop over n items by strides of the whole grid: enough to fill every GPU, few enough to amortize their start.
inline unsigned grid_for(int64_t n, int64_t items_per_block, int64_t most = 132 * 16) {
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(n, items_per_block), 1, most));
}

/// The first index of this thread and its stride in such a loop.
__device__ inline int64_t global_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline int64_t global_stride() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

}  // namespace
}  // namespace mesa::kernels::cuda
