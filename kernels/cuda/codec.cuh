// The codec on a GPU. A thread works on units: unit u is the 8 elements from 8 u on (logical order), which one call of Philox dithers and
// whose codes are `bits` whole bytes.
#pragma once
#include <cfloat>
#include <numeric>

#include "divider.h"
#include "mesa/kernels/codec_common.h"
#include "mesa/kernels/codec_scalar.h"

namespace mesa::kernels::cuda {
namespace {

inline constexpr int kUnit = 8;

// --- which group, which address ---------------------------------------------------------------------------------------------------

/// The groups of whole units: G = 1, unit u lies in group of(u); or, where each element is a group of its own, G = 8: its elements lie in
/// groups 8 of(u) .. 8 of(u) + 7.
struct UnitGroups {
  Divider inner, groups;

  UnitGroups(const GroupLayout& layout, int G) : inner(layout.inner * G / kUnit), groups(layout.groups / G) {}
  __device__ uint32_t of(uint32_t u) const { return groups.remainder(inner.quotient(u)); }
};

/// 8 elements as they are loaded.
template <class T>
struct Unit;
template <>
struct Unit<float> {
  float value[kUnit];
  __device__ float operator[](int i) const { return value[i]; }
  __device__ void values(float (&v)[kUnit]) const {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) v[i] = value[i];
  }
  __device__ void push_front(float x) {
#pragma unroll
    for (int i = kUnit - 1; i > 0; --i) value[i] = value[i - 1];
    value[0] = x;
  }
};
template <>
struct Unit<bf16> {
  uint32_t pair[kUnit / 2];
  __device__ float operator[](int i) const { return scalar::float_of(i % 2 ? pair[i / 2] & 0xffff0000u : pair[i / 2] << 16); }
  __device__ void values(float (&v)[kUnit]) const {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) v[i] = (*this)[i];
  }
  __device__ void push_front(bf16 x) {
#pragma unroll
    for (int i = kUnit / 2 - 1; i > 0; --i) pair[i] = pair[i] << 16 | pair[i - 1] >> 16;
    pair[0] = pair[0] << 16 | x.bits;
  }
};

/// A tensor as units, 16 bytes a load. Rows consist of whole units; only a contiguous tensor may end within one.
template <class T>
struct Units {
  const T* data;
  int64_t gap = 0;     ///< from the end of a row to the next
  Divider row;         ///< units in a row
  uint32_t count = 0;  ///< units, of which
  uint32_t whole = 0;  ///< so many have 8 elements, and the last, if it is not among them,
  int rest = 0;        ///< so many

  __device__ int valid(uint32_t u) const { return u < whole ? kUnit : rest; }

  __device__ const T* at(uint32_t u) const {
    const T* p = data + int64_t{u} * kUnit;
    if (gap != 0) p += gap * row.quotient(u);
    return p;
  }
  /// The elements between a unit and another, `units` farther on and as far into a row.
  __device__ int64_t distance(uint32_t units) const { return int64_t{units} * kUnit + gap * row.quotient(units); }

  /// The unit at such an address.
  __device__ static Unit<T> load(const T* p) {
    Unit<T> x;
    constexpr int kStep = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < kUnit; i += kStep) {
      const Pack<uint32_t, 4> words = *reinterpret_cast<const Pack<uint32_t, 4>*>(p + i);
      memcpy(reinterpret_cast<char*>(&x) + i * sizeof(T), &words, sizeof words);
    }
    return x;
  }
  __device__ Unit<T> load(uint32_t u) const { return u < whole ? load(at(u)) : load_rest(); }
  /// The last element stands in for what is missing: that changes no range.
  __device__ Unit<T> load_rest() const {
    Unit<T> x{};
#pragma unroll 1
    for (int i = kUnit - 1; i >= 0; --i) x.push_front(data[int64_t{whole} * kUnit + min(i, rest - 1)]);
    return x;
  }
};

/// Unit u of contiguous elements, of which `valid` exist.
template <class Y>
__device__ inline void store_unit(Y* to, uint32_t u, const float (&v)[kUnit], int valid) {
  to += int64_t{u} * kUnit;
  if (valid < kUnit) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i)
      if (i < valid) store(to + i, v[i]);
    return;
  }
  constexpr int kStep = 16 / sizeof(Y);
#pragma unroll
  for (int from = 0; from < kUnit; from += kStep) {
    float part[kStep];
#pragma unroll
    for (int i = 0; i < kStep; ++i) part[i] = v[from + i];
    store_pack(to + from, part);
  }
}
/// What is left of x where it is kept as T.
template <class T>
__device__ inline float rounded_to(float x) {
  T kept;
  store(&kept, x);
  return load(&kept);
}

// --- codes --------------------------------------------------------------------------------------------------------------------------

/// The scales of groups: steps times `divisor`, which is 1 where they are given as they are and 2^bits - 1 where they are extents. Without
/// any, bounds that nothing finite lies outside of. The end of the same pass may write new ones in their place.
struct Scales {
  const float *step = nullptr, *offset = nullptr;
  float divisor = 1;

  __device__ GroupScale of(int64_t g, int bits) const { return group_scale(step[g] / divisor, offset[g], bits); }
  template <int bits>
  __device__ GroupScale of(int64_t g) const {
    if constexpr (bits == 0)
      return {0.0f, 0.0f, -FLT_MAX, FLT_MAX};
    else
      return of(g, bits);
  }
};

/// Philox with its round keys made in advance: a thread then spends two multiplications and two xors on a round, and nothing else.
struct Dither {
  static constexpr int kRounds = 10;
  uint64_t step;
  const uint64_t* live;  ///< see RandomKey
  uint32_t keys[2 * kRounds];
  uint32_t exponent = 0x4b00u;  ///< of 2^23; a parameter, because nvcc would load a literal anew for every use

  explicit Dither(RandomKey key) : step(key.step), live(key.live) {
    uint32_t k0 = static_cast<uint32_t>(key.key), k1 = static_cast<uint32_t>(key.key >> 32);
    for (int r = 0; r < kRounds; ++r, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) keys[2 * r] = k0, keys[2 * r + 1] = k1;
  }

  /// philox(u, step, key).
  __device__ Philox4 words(uint32_t u) const {
    const uint64_t now = live != nullptr ? __ldg(live) : step;
    uint32_t c0 = u, c1 = 0, c2 = static_cast<uint32_t>(now), c3 = static_cast<uint32_t>(now >> 32);
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ keys[2 * r];
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ keys[2 * r + 1];
      c1 = static_cast<uint32_t>(p1);
      c3 = static_cast<uint32_t>(p0);
    }
    return {{c0, c1, c2, c3}};
  }
  /// dither_value of a word's low or high half h: 0x4b00hhhh is the float 2^23 + h, and 2^23 2^-16 - 2^-17 needs no more than 24 bits.
  __device__ float value(uint32_t word, int half) const {
    return std::fma(scalar::float_of(__byte_perm(word, exponent, half ? 0x5432u : 0x5410u)), 0x1p-16f, -(128.0f - 0x1p-17f));
  }
};

/// An integer of n bits.
template <int n>
using Bits = std::conditional_t<n == 64, uint64_t, std::conditional_t<n == 32, uint32_t, std::conditional_t<n == 16, uint16_t, uint8_t>>>;
/// The codes of a unit.
template <int bits>
using CodeWord = Bits<kUnit * bits>;

/// The n codes of v, the sums that quantize_value clamps and truncates: here the conversion rounds down, saturates and makes NaN 0, and the
/// packing clamps.
template <int bits, int n>
__device__ inline uint64_t pack_codes(const float (&v)[n]) {
  uint64_t word = 0;
  constexpr int kWordCodes = n < 32 / bits ? n : 32 / bits;
#pragma unroll
  for (int from = n - kWordCodes; from >= 0; from -= kWordCodes) {
    uint32_t codes = 0;
#pragma unroll
    for (int i = from + kWordCodes - 2; i >= from; i -= 2)
      codes = pack_clamped<bits>(__float2int_rd(v[i]), __float2int_rd(v[i + 1]), codes);
    word = word << 32 | codes;
  }
  return word;
}

/// The codes of one unit; scale[i % G] is element i's.
template <int bits, bool stochastic, class T, int G>
__device__ inline CodeWord<bits> quantize_unit(const Unit<T>& x, uint32_t u, const Dither& dither, const GroupScale (&scale)[G]) {
  Philox4 random{};
  if constexpr (stochastic) random = dither.words(u);
  float v[kUnit];
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    const float up = stochastic ? dither.value(random.word[i / 2], i % 2) : 0.5f;
    v[i] = std::fma(x[i] - scale[i % G].offset, scale[i % G].inverse, up);
  }
  return static_cast<CodeWord<bits>>(pack_codes<bits>(v));
}

/// The first `valid` codes of a unit; the unused high bits of the last byte are 0.
template <int bits>
__device__ inline void store_few_codes(uint8_t* codes, uint64_t word, int valid) {
  if (valid < kUnit) word &= (uint64_t{1} << valid * bits) - 1;
#pragma unroll 1
  for (int i = 0; i < valid * bits; i += 8) codes[i / 8] = static_cast<uint8_t>(word >> i);
}
template <int bits>
__device__ inline void store_codes(uint8_t* codes, uint32_t u, CodeWord<bits> word) {
  __stcs(reinterpret_cast<CodeWord<bits>*>(codes) + u, word);
}

/// G of UnitGroups, or 0 where units straddle groups.
inline int unit_groups(const GroupLayout& layout, int64_t n) {
  if (ceil_div(n, kUnit) >= int64_t{1} << 31) return 0;  // see Divider
  if (layout.inner % kUnit == 0) return 1;
  return !layout.consecutive && layout.inner == 1 && layout.groups % kUnit == 0 ? kUnit : 0;
}

/// True if x can be read as Units.
inline bool has_units(const Tensor& x) {
  const int64_t width = width_of(x), gap = x.row_stride() - width;
  return x.dtype() != DType::f64 && aligned(x.raw(), 16) && (gap == 0 || (width % kUnit == 0 && gap * size_of(x.dtype()) % 16 == 0));
}
template <class T>
Units<T> units_of(const Tensor& x) {
  const int64_t n = x.numel(), width = width_of(x);
  return {x.data<T>(),
          x.row_stride() - width,
          Divider(width / kUnit),
          static_cast<uint32_t>(ceil_div(n, kUnit)),
          static_cast<uint32_t>(n / kUnit),
          static_cast<int>(n % kUnit)};
}

/// f(tag of T, integral constants bits, G) for f32 or bf16.
template <class F>
void dispatch_units(DType dtype, int G, F&& f) {
  dispatch_narrow(dtype, [&](auto tag) {
    if (G == 1)
      f(tag, std::integral_constant<int, 1>{});
    else
      f(tag, std::integral_constant<int, kUnit>{});
  });
}
template <class F>
void dispatch_bits(int bits, F&& f) {
  if (bits == 8)
    f(std::integral_constant<int, 8>{});
  else if (bits == 4)
    f(std::integral_constant<int, 4>{});
  else
    f(std::integral_constant<int, 2>{});
}

}  // namespace
}  // namespace mesa::kernels::cuda
