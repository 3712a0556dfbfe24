#include "weighted_rows.h"

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdlib>

namespace mesa {

namespace {
constexpr int32_t kHalf = 1 << (kWeightBits - 1);

void weighted_rows_plain(const uint8_t* in, int64_t stride, const int32_t* weight, int64_t taps, int64_t n, uint8_t* out) {
  constexpr int64_t kPart = 256;
  std::array<int32_t, kPart> sums;
  for (int64_t from = 0; from < n; from += kPart) {
    const int64_t count = std::min(kPart, n - from);
    std::fill_n(sums.begin(), count, kHalf);
    for (int64_t k = 0; k < taps; ++k)
      for (int64_t i = 0; i < count; ++i) sums[i] += in[k * stride + from + i] * weight[k];
    for (int64_t i = 0; i < count; ++i) out[from + i] = static_cast<uint8_t>(std::clamp(sums[i] >> kWeightBits, 0, 255));
  }
}

// A product of 8 by 24 bits is too long for vpmaddwd, which multiplies 16 by 16 bits and adds neighbours. So a weight is split into
// high 2^kLowBits + low, and the sums of both halves, each over two taps at a time, are put together in the end; what overflows in between
// cancels, as the whole fits 32 bits.
constexpr int kLowBits = 11, kMaxTaps = 64;

struct SplitWeights {
  std::array<int32_t, kMaxTaps / 2> high, low;  // of two taps each, the first in the lower 16 bits
  int64_t pairs = 0;

  SplitWeights(const int32_t* weight, int64_t taps) {
    for (int64_t k = 0; k < taps; k += 2) {
      const int32_t a = weight[k], b = k + 1 < taps ? weight[k + 1] : 0;
      constexpr int32_t kMask = (1 << kLowBits) - 1;
      high[pairs] = static_cast<int32_t>(static_cast<uint32_t>(a >> kLowBits & 0xFFFF) | static_cast<uint32_t>(b >> kLowBits) << 16);
      low[pairs++] = (a & kMask) | (b & kMask) << 16;
    }
  }
};

/// 32 bytes of the output; `last` is the last row.
[[gnu::target("avx2")]] void weigh_32(const uint8_t* in, int64_t stride, const SplitWeights& weights, const uint8_t* last, uint8_t* out) {
  const __m256i zero = _mm256_setzero_si256();
  __m256i high[4] = {zero, zero, zero, zero}, low[4];
  for (__m256i& sum : low) sum = _mm256_set1_epi32(kHalf);
  for (int64_t k = 0; k < weights.pairs; ++k, in += 2 * stride) {
    const __m256i wh = _mm256_set1_epi32(weights.high[k]), wl = _mm256_set1_epi32(weights.low[k]);
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(std::min(in + stride, last)));  // beyond it the weight is 0
    const __m256i ab[2] = {_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)};
    for (int i = 0; i < 4; ++i) {
      const __m256i pair = i % 2 == 0 ? _mm256_unpacklo_epi8(ab[i / 2], zero) : _mm256_unpackhi_epi8(ab[i / 2], zero);
      high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(pair, wh));
      low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(pair, wl));
    }
  }
  for (int i = 0; i < 4; ++i) low[i] = _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(high[i], kLowBits), low[i]), kWeightBits);
  const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(low[0], low[1]), _mm256_packs_epi32(low[2], low[3]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bytes);
}

bool has_avx2() {
  const char* lowered = std::getenv("MESA_CPU");
  return __builtin_cpu_supports("avx2") && !(lowered != nullptr && *lowered == 'p');
}

/// 16 rows and columns, by four rounds of interleaving.
void transpose_16(const uint8_t* in, int64_t in_stride, uint8_t* out, int64_t out_stride) {
  __m128i rows[16], next[16];
  for (int i = 0; i < 16; ++i) rows[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i * in_stride));
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 8; ++i) {
      next[2 * i] = _mm_unpacklo_epi8(rows[i], rows[i + 8]);
      next[2 * i + 1] = _mm_unpackhi_epi8(rows[i], rows[i + 8]);
    }
    std::copy_n(next, 16, rows);
  }
  for (int i = 0; i < 16; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * out_stride), rows[i]);
}
}  // namespace

void weighted_rows(const uint8_t* in, int64_t stride, const int32_t* weight, int64_t taps, int64_t n, uint8_t* out) {
  static const bool fast = has_avx2();
  while (taps > 1 && weight[taps - 1] == 0) --taps;
  if (!fast || n < 32 || taps > kMaxTaps) return weighted_rows_plain(in, stride, weight, taps, n, out);
  const SplitWeights weights(weight, taps);
  for (int64_t i = 0; i < n; i += 32) {
    const int64_t at = std::min(i, n - 32);  // the last 32 may overlap those before
    weigh_32(in + at, stride, weights, in + at + (taps - 1) * stride, out + at);
  }
}

void transpose_bytes(const uint8_t* in, int64_t in_stride, int64_t rows, int64_t columns, uint8_t* out, int64_t out_stride) {
  const int64_t whole_rows = rows / 16 * 16, whole_columns = columns / 16 * 16;
  for (int64_t y = 0; y < whole_rows; y += 16)
    for (int64_t x = 0; x < whole_columns; x += 16) transpose_16(in + y * in_stride + x, in_stride, out + x * out_stride + y, out_stride);
  for (int64_t y = 0; y < rows; ++y)
    for (int64_t x = y < whole_rows ? whole_columns : 0; x < columns; ++x) out[x * out_stride + y] = in[y * in_stride + x];
}

}  // namespace mesa
