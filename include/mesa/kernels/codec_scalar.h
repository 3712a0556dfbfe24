// One element of the affine codec, for host and device: q = clamp(floor(fma(x - offset, 1/step, u)), 0, 2^bits - 1) and back,
// x' = fma(q, step, offset).
// Every function is `static`: the CPU kernels compile this header once for each instruction set, and merged copies would mix the sets.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "mesa/base/dtype.h"

namespace mesa::kernels {

// Floats as integers of the same order (-0 before +0), so that minimum and maximum do not depend on the order of reduction. Positive NaNs
// lie above +infinity and negative ones below -infinity: the two extremes alone tell whether a group holds anything that is not finite.
inline constexpr int32_t kKeyPlusInfinity = 0x7f800000;
inline constexpr int32_t kKeyMinusInfinity = -0x7f800001;

MESA_HD static inline int32_t ordered_key(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

MESA_HD static inline float key_value(int32_t key) {
  const int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

MESA_HD static inline bool is_finite_key(int32_t key) { return key > kKeyMinusInfinity && key < kKeyPlusInfinity; }

/// 2^bits - 1, the largest code.
MESA_HD static inline float top_code(int bits) { return static_cast<float>((1 << bits) - 1); }

/// 1/step rounded once; 0 for a constant group, that is where 1/step is not finite: every element then gets code 0.
MESA_HD static inline float inverse_step(float step) {
  const float inverse = 1.0f / step;
  return is_finite_key(ordered_key(inverse)) ? inverse : 0.0f;
}

/// The step that spreads [lo, hi] over the codes, 0 if it is too small to divide by. A range beyond the floats is halved before it is
/// divided; elements more than FLT_MAX above lo then clamp to the top.
MESA_HD static inline float step_of_range(float lo, float hi, int bits) {
  const float top = top_code(bits);
  const float range = hi - lo;
  const float step = is_finite_key(ordered_key(range)) ? range / top : (0.5f * hi - 0.5f * lo) / (0.5f * top);
  return inverse_step(step) == 0.0f ? 0.0f : step;
}

/// What the quantizer needs to know of one group. An element is saturated if x - offset lies outside [low, high], which is the range
/// widened by a thousandth of a step at both ends: rounding never reaches that far.
struct GroupScale {
  float inverse, offset, low, high;
};

MESA_HD static inline GroupScale group_scale(float step, float offset, int bits) {
  return {inverse_step(step), offset, -1e-3f * step, step * (top_code(bits) + 1e-3f)};
}

MESA_HD static inline bool is_saturated(float d, const GroupScale& s) { return d < s.low || d > s.high; }

/// (h + 1/2) / 65,536 (exact, contracted or not).
MESA_HD static inline float dither_value(uint16_t h) { return static_cast<float>(h) * 0x1p-16f + 0x1p-17f; }

/// The code of an element at distance d = x - offset; NaN gives 0.
MESA_HD static inline uint8_t quantize_value(float d, float inverse, float u, float top) {
  float v = std::fma(d, inverse, u);
  v = v > 0.0f ? v : 0.0f;
  v = v < top ? v : top;
  return static_cast<uint8_t>(static_cast<int32_t>(v));
}

/// A running estimate of a group's extent and its minimum. An extent beyond f32 would stay infinite in the average for ever.
struct RangeEstimate {
  float alpha, beta;
};
MESA_HD static inline RangeEstimate calibrated_range(float lo, float hi) {
  const double extent = static_cast<double>(hi) - lo, most = 3.40282346638528859812e38;
  return {static_cast<float>(extent < most ? extent : most), lo};
}
/// decay old + (1 - decay) new; a group that was constant so far calibrates again.
MESA_HD static inline RangeEstimate averaged_range(RangeEstimate old, float lo, float hi, double decay) {
  if (old.alpha == 0) return calibrated_range(lo, hi);
  const RangeEstimate now = calibrated_range(lo, hi);
  return {static_cast<float>(std::fma(decay, static_cast<double>(old.alpha), (1 - decay) * now.alpha)),
          static_cast<float>(std::fma(decay, static_cast<double>(old.beta), (1 - decay) * now.beta))};
}

MESA_HD static inline float dequantize_value(uint8_t q, float step, float offset) {
  return std::fma(static_cast<float>(q), step, offset);
}

}  // namespace mesa::kernels
