// The codec on spans that fit the first-level cache: rows -> floats, floats + dither -> codes, codes <-> packed bytes.
// Everything in the codec's headers has internal linkage, because each instruction set compiles its own copy.
#pragma once
#include <algorithm>
#include <vector>

#include "mesa/kernels/codec_common.h"
#include "mesa/kernels/codec_scalar.h"

namespace mesa::kernels::MESA_ISA {
namespace {

/// Elements handled at once: a multiple of what one call of dither() makes.
constexpr int64_t kPiece = 1024;
/// Elements of one unit of parallel work: whole pieces, so that no byte of codes is shared by two threads.
constexpr int64_t kChunk = 16 * kPiece;

/// Elements that a pass found outside the range, or not finite.
struct OddCounts {
  int64_t saturated = 0, nonfinite = 0;
};
inline void add_counts(const Tensor& counts, const OddCounts& seen) {
  int64_t* const pair = count_pair(counts);
  if (pair == nullptr) return;
  pair[0] += seen.saturated;
  pair[1] += seen.nonfinite;
}

/// A tensor of uniform rows, read in logical order as floats.
class Rows {
 public:
  explicit Rows(const Tensor& x)
      : data_(x.raw()), dtype_(x.dtype()), width_(x.rank() == 0 ? 1 : x.dim(-1)), stride_(x.rows() > 1 ? x.row_stride() : width_) {}

  /// Elements from..from+n-1: where they lie if that is possible, otherwise converted and copied to `buffer`.
  const float* load(int64_t from, int64_t n, float* buffer) const {
    switch (dtype_) {
      case DType::f32: return load_as<float>(from, n, buffer);
      case DType::bf16: return load_as<bf16>(from, n, buffer);
      default: return load_as<double>(from, n, buffer);
    }
  }

 private:
  template <class T>
  const float* load_as(int64_t from, int64_t n, float* __restrict buffer) const {
    const int64_t row = stride_ == width_ ? 0 : from / width_;
    int64_t column = from - row * width_;
    const T* source = static_cast<const T*>(data_) + row * stride_;
    if constexpr (std::is_same_v<T, float>) {
      if (stride_ == width_ || column + n <= width_) return source + column;
    }
    for (int64_t i = 0; i < n; source += stride_, column = 0) {
      const int64_t count = stride_ == width_ ? n : std::min(width_ - column, n - i);
      for (int64_t j = 0; j < count; ++j) buffer[i + j] = static_cast<float>(source[column + j]);
      i += count;
    }
    return buffer;
  }

  const void* data_;
  DType dtype_;
  int64_t width_, stride_;
};

/// Calls f(group, within, first, count) for the runs of one group among elements from..from+n-1: `first` counts from `from`, `within` from
/// the start of the group's run of `inner` elements.
template <class F>
inline void for_runs(const GroupLayout& layout, int64_t from, int64_t n, F&& f) {
  const int64_t run = from / layout.inner;
  int64_t within = from - run * layout.inner;
  int64_t group = run % layout.groups;
  for (int64_t i = 0; i < n; within = 0) {
    const int64_t count = std::min(layout.inner - within, n - i);
    f(group, within, i, count);
    i += count;
    if (++group == layout.groups) group = 0;
  }
}

/// Consecutive groups short enough that one thread takes them whole.
inline bool is_short_groups(const GroupLayout& layout) { return layout.consecutive && layout.inner <= kChunk; }

/// Unit of parallel work with whole groups of such a layout, and no byte of codes or Philox call shared.
inline int64_t whole_groups(const GroupLayout& layout, int64_t elements) {
  int64_t unit = layout.inner;
  while (unit % 8) unit *= 2;
  return unit * std::max<int64_t>(1, elements / unit);
}

// Runs that are shorter than a few vectors are slow one by one. Then tables give each element of a period its own scale, the period being
// a whole number of [groups, inner] blocks, and runs as long as the period are walked instead.
constexpr int64_t kShortRun = 32, kLongPeriod = 8192;

inline bool is_elementwise(const GroupLayout& layout) {
  return !layout.consecutive && layout.inner < kShortRun && layout.groups * layout.inner <= kLongPeriod;
}

/// The layout of whole periods as one group.
inline GroupLayout period_layout(const GroupLayout& layout) {
  const int64_t block = layout.groups * layout.inner;
  return {layout.outer, 1, block * std::max<int64_t>(1, 256 / std::max<int64_t>(1, block))};
}

// ---- Codes ---------------------------------------------------------------------------------------------------------------------------

/// kPiece unpacked codes, readable as bytes or as words of several codes (hosts are little-endian: the first code is low).
union CodeBuffer {
  uint8_t byte[kPiece];
  uint16_t pair[kPiece / 2];
  uint32_t four[kPiece / 4];
};

/// n codes -> ceil(n bits / 8) bytes; the unused high bits of the last byte are 0.
inline void pack_codes(CodeBuffer& q, int64_t n, int bits, uint8_t* __restrict packed) {
  const int64_t each = 8 / bits, count = (n + each - 1) / each;
  for (int64_t i = n; i < count * each; ++i) q.byte[i] = 0;
  if (bits == 4) {
    for (int64_t i = 0; i < count; ++i) packed[i] = static_cast<uint8_t>(q.pair[i] | q.pair[i] >> 4);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t w = q.four[i];
      packed[i] = static_cast<uint8_t>(w | w >> 6 | w >> 12 | w >> 18);
    }
  }
}

/// The inverse; writes whole bytes' worth of codes, up to 3 beyond n.
inline void unpack_codes(const uint8_t* __restrict packed, int64_t n, int bits, CodeBuffer& q) {
  const int64_t each = 8 / bits, count = (n + each - 1) / each;
  if (bits == 4) {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t w = packed[i];
      q.pair[i] = static_cast<uint16_t>((w | w << 4) & 0x0f0fu);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t w = packed[i];
      q.four[i] = (w | w << 6 | w << 12 | w << 18) & 0x03030303u;
    }
  }
}

}  // namespace
}  // namespace mesa::kernels::MESA_ISA
