// The two loops of resampling, over rows of bytes.
#pragma once
#include <cstdint>

namespace mesa {

/// Weights have so many bits behind the point: two bits of headroom, as cubic weights overshoot.
inline constexpr int kWeightBits = 32 - 8 - 2;

/// out[i] = round(2^-kWeightBits sum_k weight[k] in[k stride + i]) for i in 0..n-1, clamped to a byte. Exact integers on every CPU.
void weighted_rows(const uint8_t* in, int64_t stride, const int32_t* weight, int64_t taps, int64_t n, uint8_t* out);

/// out[x out_stride + y] = in[y in_stride + x] for y in 0..rows-1 and x in 0..columns-1.
void transpose_bytes(const uint8_t* in, int64_t in_stride, int64_t rows, int64_t columns, uint8_t* out, int64_t out_stride);

}  // namespace mesa
