// Vectors of one instruction set's width, for the few places where gcc's own vectorization of the codec's loops falls short.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>

namespace mesa::kernels::MESA_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
typedef int32_t IntLanes __attribute__((vector_size(64)));
typedef float FloatLanes __attribute__((vector_size(64)));
constexpr IntLanes kLaneNumber = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
constexpr int kLanes = 8;
typedef int32_t IntLanes __attribute__((vector_size(32)));
typedef float FloatLanes __attribute__((vector_size(32)));
constexpr IntLanes kLaneNumber = {0, 1, 2, 3, 4, 5, 6, 7};
#else
constexpr int kLanes = 4;
typedef int32_t IntLanes __attribute__((vector_size(16)));
typedef float FloatLanes __attribute__((vector_size(16)));
constexpr IntLanes kLaneNumber = {0, 1, 2, 3};
#endif

// larger and smaller return b where a is NaN, as the instructions and the scalar `a > b ? a : b` do.
#if defined(__AVX512F__)
inline FloatLanes fused(FloatLanes a, FloatLanes b, FloatLanes c) { return _mm512_fmadd_ps(a, b, c); }
inline FloatLanes larger(FloatLanes a, FloatLanes b) { return _mm512_maskz_max_ps(0xffff, a, b); }
inline FloatLanes smaller(FloatLanes a, FloatLanes b) { return _mm512_maskz_min_ps(0xffff, a, b); }
inline IntLanes load_halves(const uint16_t* h) {
  return reinterpret_cast<IntLanes>(_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(h))));
}
#elif defined(__AVX2__)
inline FloatLanes fused(FloatLanes a, FloatLanes b, FloatLanes c) { return _mm256_fmadd_ps(a, b, c); }
inline FloatLanes larger(FloatLanes a, FloatLanes b) { return _mm256_max_ps(a, b); }
inline FloatLanes smaller(FloatLanes a, FloatLanes b) { return _mm256_min_ps(a, b); }
inline IntLanes load_halves(const uint16_t* h) {
  return reinterpret_cast<IntLanes>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(h))));
}
#else
inline FloatLanes fused(FloatLanes a, FloatLanes b, FloatLanes c) {  // no instruction: slow, but rounded once
  for (int i = 0; i < kLanes; ++i) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
}
inline FloatLanes larger(FloatLanes a, FloatLanes b) { return a > b ? a : b; }
inline FloatLanes smaller(FloatLanes a, FloatLanes b) { return a < b ? a : b; }
inline IntLanes load_halves(const uint16_t* h) { return IntLanes{h[0], h[1], h[2], h[3]}; }
#endif

/// Lanes of 0..255 as bytes.
inline void store_bytes(IntLanes v, uint8_t* to) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // gcc converts these lane by lane
  const __m256i wide = reinterpret_cast<__m256i>(v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
#else
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  const Bytes bytes = __builtin_convertvector(v, Bytes);
  __builtin_memcpy(to, &bytes, sizeof bytes);
#endif
}

template <class Lanes, class T>
inline Lanes load_lanes(const T* from) {
  Lanes v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

}  // namespace
}  // namespace mesa::kernels::MESA_ISA
