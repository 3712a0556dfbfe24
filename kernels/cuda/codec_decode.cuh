// Units of codes as they are read and decoded, each to the dtype that it was packed from, as if it had been kept there.
#pragma once
#include "codec.cuh"

namespace mesa::kernels::cuda {
namespace {

/// How many elements there are, by units.
struct Extent {
  uint32_t count, whole;
  int rest;
};

template <int bits>
__device__ inline uint64_t load_codes(const uint8_t* codes, const Extent& extent, uint32_t u) {
  if (u < extent.whole) return __ldcs(reinterpret_cast<const CodeWord<bits>*>(codes) + u);
  uint64_t word = 0;
#pragma unroll 1
  for (int i = 0; i < extent.rest * bits; i += 8) word |= uint64_t{codes[int64_t{u} * bits + i / 8]} << i;
  return word;
}

/// A unit's G steps or offsets.
template <int G>
__device__ inline void load_scales(const float* from, float (&to)[G]) {
  if constexpr (G == 1) {
    to[0] = *from;
  } else {
#pragma unroll
    for (int i = 0; i < G; i += 4) {
      const Pack<float, 4> four = *reinterpret_cast<const Pack<float, 4>*>(from + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) to[i + j] = four.v[j];
    }
  }
}

/// x = fma(q, step, offset) of a unit's codes, rounded to T.
template <class T, int bits, int G>
__device__ inline void decode_unit(uint64_t word, const float (&step)[G], const float (&offset)[G], float (&x)[kUnit]) {
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    const uint8_t q = static_cast<uint8_t>(word >> i * bits & ((1u << bits) - 1));
    x[i] = rounded_to<T>(dequantize_value(q, step[i % G], offset[i % G]));
  }
}

}  // namespace
}  // namespace mesa::kernels::cuda
