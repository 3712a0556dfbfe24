// Dither: h(e) is the low (e even) or high (e odd) half of word (e % 8) / 2 of philox(e / 8, step, key); many counters at once.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstring>

#include "mesa/base/random.h"

namespace mesa::kernels::MESA_ISA {
namespace {

// One counter's 32-bit state word stands in the low half of a 64-bit lane. The high half is left as it falls, since the multiply ignores
// it: that spares every mask and every even-odd shuffle until the end.
#if defined(__AVX512F__)
constexpr int kWordLanes = 8;
typedef uint64_t Words __attribute__((vector_size(64)));
inline Words multiply_low_halves(Words a, Words b) {  // maskz: the plain form trips gcc 12's -Wmaybe-uninitialized
  return reinterpret_cast<Words>(_mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
constexpr Words kLane = {0, 1, 2, 3, 4, 5, 6, 7}, kZipLow = {0, 8, 1, 9, 2, 10, 3, 11}, kZipHigh = {4, 12, 5, 13, 6, 14, 7, 15};
#elif defined(__AVX2__)
constexpr int kWordLanes = 4;
typedef uint64_t Words __attribute__((vector_size(32)));
inline Words multiply_low_halves(Words a, Words b) {
  return reinterpret_cast<Words>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
constexpr Words kLane = {0, 1, 2, 3}, kZipLow = {0, 4, 1, 5}, kZipHigh = {2, 6, 3, 7};
#else
constexpr int kWordLanes = 2;
typedef uint64_t Words __attribute__((vector_size(16)));
inline Words multiply_low_halves(Words a, Words b) {
#if defined(__SSE2__)
  return reinterpret_cast<Words>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}
constexpr Words kLane = {0, 1}, kZipLow = {0, 2}, kZipHigh = {1, 3};
#endif

/// Vectors of counters in flight: ten rounds are one long dependency, so several must overlap.
constexpr int kChains = 4;
constexpr int64_t kDitherCall = 8 * kWordLanes * kChains;

/// h for elements 8 counter .. 8 counter + n - 1, n rounded up to a multiple of kDitherCall.
[[gnu::noinline, maybe_unused]] void dither(uint64_t counter, int64_t n, RandomKey key, uint16_t* __restrict h) {
  const Words zero = {}, low_half = zero + 0xffffffffu, m0 = zero + 0xD2511F53u, m1 = zero + 0xCD9E8D57u;
  for (int64_t i = 0; i < n; i += kDitherCall) {
    Words c0[kChains], c1[kChains], c2[kChains], c3[kChains];
    for (int j = 0; j < kChains; ++j, counter += kWordLanes) {
      c0[j] = counter + kLane;
      c1[j] = c0[j] >> 32;
      c2[j] = zero + key.step;
      c3[j] = zero + (key.step >> 32);
    }
    uint32_t k0 = static_cast<uint32_t>(key.key), k1 = static_cast<uint32_t>(key.key >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
#pragma GCC unroll 4
      for (int j = 0; j < kChains; ++j) {
        const Words p0 = multiply_low_halves(c0[j], m0), p1 = multiply_low_halves(c2[j], m1);
        c0[j] = (p1 >> 32) ^ c1[j] ^ k0;
        c2[j] = (p0 >> 32) ^ c3[j] ^ k1;
        c1[j] = p1;
        c3[j] = p0;
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kChains; ++j) {
      const Words low = (c0[j] & low_half) | (c1[j] << 32), high = (c2[j] & low_half) | (c3[j] << 32);
      const Words halves[2] = {__builtin_shuffle(low, high, kZipLow), __builtin_shuffle(low, high, kZipHigh)};
      memcpy(h + i + 8 * kWordLanes * j, halves, sizeof halves);
    }
  }
}

}  // namespace
}  // namespace mesa::kernels::MESA_ISA
