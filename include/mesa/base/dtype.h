// Element types, and bf16 as a storage type with round-to-nearest-even conversions.
#pragma once
#include <cstdint>
#include <cstring>

#include "mesa/base/error.h"

#ifdef __CUDACC__
#define MESA_HD __host__ __device__
#else
#define MESA_HD
#endif

namespace mesa {

enum class DType : uint8_t { f32, bf16, f64, u8, i32, i64 };

struct bf16 {
  uint16_t bits = 0;
  bf16() = default;
  /// Rounds to nearest, ties to even; NaN stays NaN (quiet).
  MESA_HD explicit bf16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const uint32_t quiet = (u >> 16) | 0x40u;
    bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
  }
  MESA_HD operator float() const {
    const uint32_t u = static_cast<uint32_t>(bits) << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
  }
};

int64_t size_of(DType dtype);
const char* to_string(DType dtype);
bool is_floating(DType dtype);

template <class T> inline constexpr bool has_dtype = false;
template <class T> inline constexpr DType dtype_of = DType::f32;
#define MESA_DTYPE(type, tag)                      \
  template <> inline constexpr bool has_dtype<type> = true; \
  template <> inline constexpr DType dtype_of<type> = DType::tag
MESA_DTYPE(float, f32);
MESA_DTYPE(bf16, bf16);
MESA_DTYPE(double, f64);
MESA_DTYPE(uint8_t, u8);
MESA_DTYPE(int32_t, i32);
MESA_DTYPE(int64_t, i64);
#undef MESA_DTYPE

/// Calls f with a value of the C++ type: dispatch_float(x.dtype(), [&](auto tag) { using T = decltype(tag); ... }).
template <class F>
auto dispatch_float(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(bf16{});
    case DType::f64: return f(double{});
    default: fail("a tensor of ", to_string(dtype), " where a floating one is needed");
  }
}

}  // namespace mesa
