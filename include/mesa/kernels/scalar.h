// The scalar mathematics of the kernels, written once for host and device so that their results cannot drift apart.
// float functions are branch-free and vectorize; double functions call the standard library. A NaN argument gives a NaN.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "mesa/base/dtype.h"
#include "mesa/base/random.h"

// Internal linkage and forced inlining: the kernel objects of several instruction sets include this header, and one shared copy of a
// function, compiled for one of them, must never serve the others.
#define MESA_SCALAR [[gnu::always_inline]] MESA_HD static inline

namespace mesa::scalar {

MESA_SCALAR uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
MESA_SCALAR float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

/// x = n ln 2 + r with |r| <= ln(2) / 2: exp(r), and the bits of n + 1.5 * 2^23, whose low end is n in two's complement.
struct ReducedExp {
  float power;
  uint32_t shifted;
};
inline constexpr float kExpRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
MESA_SCALAR ReducedExp reduce_exp(float x) {
  const float t = x * 1.44269504f + kExpRound;
  const float n = t - kExpRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact in n's range
  float p = 1.9875691500e-4f;                                   // minimax polynomial of Cephes expf (S. Moshier)
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return {(p * r) * r + r + 1.0f, bits_of(t)};
}

/// exp(x), about 1 ulp; 0 for -infinity, subnormal results and overflow to infinity as they should be.
MESA_SCALAR float exp_(float x) {
  x = x > 89.0f ? 89.0f : x;
  x = x < -104.0f ? -104.0f : x;
  const ReducedExp e = reduce_exp(x);
  // 2^n may lie outside the normal range; its two factors never do.
  const int32_t n = static_cast<int32_t>(e.shifted - bits_of(kExpRound)), half = n >> 1;
  return e.power * float_of(static_cast<uint32_t>(half + 127) << 23) * float_of(static_cast<uint32_t>(n - half + 127) << 23);
}
MESA_SCALAR double exp_(double x) { return exp(x); }

/// exp(x) for -88.1 < x < 88: 2^n from its exponent field, 0 for n = -127.
MESA_SCALAR float exp_in_range(float x) {
#ifdef __CUDA_ARCH__
  // The GPU's own exponential, two instructions instead of fourteen, without which kernels that should wait for memory wait for arithmetic.
  // Relative error below 2^-21 + |x| 2^-24.
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));  // flushes, so that the promised zeros are zeros
  return y;
#else
  const ReducedExp e = reduce_exp(x);
  return e.power * float_of((e.shifted << 23) + 0x3f800000u);
#endif
}
/// exp(x) for x <= 0 (x up to 88 does no harm), cheaper than exp_: results below 2^-126 are 0.
MESA_SCALAR float exp_nonpositive(float x) { return exp_in_range(x < -88.0f ? -88.0f : x); }
MESA_SCALAR double exp_nonpositive(double x) { return exp(x); }

/// |x|, bounded where the normal distribution's tail vanishes, so that infinity times that tail stays 0; NaN stays NaN.
MESA_SCALAR float tail_argument(float x) { return fabsf(x) > 13.27f ? 13.27f : fabsf(x); }  // exp_in_range(-13.27^2 / 2) is just 0
MESA_SCALAR double tail_argument(double x) { return fabs(x) > 40.0 ? 40.0 : fabs(x); }

/// 1 / x for normal results: rounded once, on a GPU within an ulp or two for a fifth of the instructions.
MESA_SCALAR float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

/// The standard normal distribution at a = tail_argument(x) >= 0.
template <class T>
struct NormalTail {
  T density;  ///< phi(a) = exp(-a^2 / 2) / sqrt(2 pi)
  T tail;     ///< 1 - Phi(a)
};
/// exp(-a^2 / 2) t P(t) with t = 1 / (1 + 0.3 a), the form of Abramowitz and Stegun 7.1.26, which shares the exponential with the density;
/// P is our minimax fit of the *relative* error (1.2e-7, before rounding), so the far tail is as good as the middle.
MESA_SCALAR NormalTail<float> normal_tail(float a) {
  const float e = exp_in_range(-0.5f * a * a);
  const float t = reciprocal(1.0f + 0.3f * a);
  float p = 0.03603536758f;
  p = p * t - 0.1587097648f;
  p = p * t + 0.2089580206f;
  p = p * t - 0.05608986051f;
  p = p * t + 0.1298402303f;
  p = p * t + 0.09952403498f;
  p = p * t + 0.1208167346f;
  p = p * t + 0.119625176f;
  return {e * 0.39894228f, e * (p * t)};
}
MESA_SCALAR NormalTail<double> normal_tail(double a) {
  return {exp(-0.5 * a * a) * 0.39894228040143267794, 0.5 * erfc(a * 0.70710678118654752440)};
}

/// c - a b, on a GPU rounded once: left to the compiler, which may fuse c's own product instead, kernels would differ in the last bit.
MESA_SCALAR float less_product(float c, float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(-a, b, c);
#else
  return c - a * b;
#endif
}
MESA_SCALAR double less_product(double c, double a, double b) { return c - a * b; }

/// x Phi(x) = max(x, 0) - |x| (1 - Phi(|x|)): no cancellation on either side.
template <class T>
MESA_SCALAR T gelu(T x) {
  const T a = tail_argument(x);
  return (x > T(0) ? x : T(0)) - a * normal_tail(a).tail;
}
/// d/dx x Phi(x) = Phi(x) + x phi(x).
template <class T>
MESA_SCALAR T gelu_slope(T x) {
  const T a = tail_argument(x);
  const NormalTail<T> n = normal_tail(a);
  const T rest = less_product(n.tail, a, n.density);  // the slope at -|x|; slope(x) + slope(-x) = 1
  return x > T(0) ? T(1) - rest : rest;
}

template <class T>
MESA_SCALAR T relu(T x) {
  return x < T(0) ? T(0) : x;
}
/// Whether the gradient passes: a NaN's does.
template <class T>
MESA_SCALAR bool relu_passes(T x) {
  return !(x <= T(0));
}

/// `own` and `other` in the proportion weight : 1 - weight.
template <class T>
MESA_SCALAR T mixed(T own, T other, T weight) {
  return weight == T(1) ? own : weight * own + (T(1) - weight) * other;
}

/// log(1 + exp(x)) - t x: the cross entropy of a yes or no with log-odds x against a target t. Does not vectorize.
template <class T>
MESA_SCALAR T binary_cross_entropy(T x, T t) {
  return (x > T(0) ? x : T(0)) - t * x + std::log1p(exp_nonpositive(x > T(0) ? -x : x));
}
/// d/dx of it: 1 / (1 + exp(-x)) - t.
template <class T>
MESA_SCALAR T binary_cross_entropy_slope(T x, T t) {
  const T e = exp_nonpositive(x > T(0) ? -x : x);
  return (x > T(0) ? T(1) : e) / (T(1) + e) - t;
}

/// The smallest 24-bit integer u with u 2^-24 >= p, so that keeps(word, ..) is uniform(word) >= p in integers.
MESA_SCALAR uint32_t dropout_threshold(double p) {
  const double scaled = ceil(p * 16777216.0);
  return scaled <= 0 ? 0u : static_cast<uint32_t>(scaled);
}
MESA_SCALAR bool keeps(uint32_t word, uint32_t threshold) { return (word >> 8) >= threshold; }

}  // namespace mesa::scalar
