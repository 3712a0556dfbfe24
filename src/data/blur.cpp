// Gaussian blur as Pillow does it: three box blurs each way, in 24-bit fixed point.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "mesa/base/error.h"
#include "mesa/data/pixels.h"

namespace mesa::pixels {
namespace {
constexpr int kPasses = 3;

/// A box of 2 radius + 1 whole elements and a part of one more at each end.
struct FractionalBox {
  int64_t radius;
  uint32_t whole, part;  // weights in 2^-24

  explicit FractionalBox(float length) : radius(static_cast<int64_t>(length)) {
    whole = static_cast<uint32_t>(static_cast<float>(1 << 24) / (length * 2 + 1));
    part = ((1u << 24) - static_cast<uint32_t>(radius * 2 + 1) * whole) / 2;
  }
  int64_t taps() const { return 2 * radius + 3; }
};

/// The radius of the box whose threefold application has the variance of the Gaussian: equations 7, 11 and 14 of Gwosdek et al., in
/// float where Pillow has floats.
float box_radius(float sigma) {
  const float variance = sigma * sigma / kPasses;
  const auto length = static_cast<float>(std::sqrt(12.0 * variance + 1.0));
  const auto whole = static_cast<float>(std::floor((length - 1.0) / 2.0));
  float part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance);
  part /= 6 * (variance - (whole + 1) * (whole + 1));
  return whole + part;
}

/// out[i] = the box over lines[0][i], lines[1][i], ..., lines[taps - 1][i]; `sums` is scratch. No element waits for another.
void blur_lines(const FractionalBox& box, const uint8_t* const* lines, int64_t count, uint32_t* sums, uint8_t* out) {
  const uint8_t *first = lines[0], *last = lines[box.taps() - 1];
  std::fill_n(sums, count, 0u);
  for (int64_t k = 1; k <= 2 * box.radius + 1; ++k) {
    const uint8_t* line = lines[k];
    for (int64_t i = 0; i < count; ++i) sums[i] += line[i];
  }
  for (int64_t i = 0; i < count; ++i)
    out[i] = static_cast<uint8_t>((sums[i] * box.whole + static_cast<uint32_t>(first[i] + last[i]) * box.part + (1u << 23)) >> 24);
}

/// Scratch memory of one thread, kept between pictures.
struct Workspace {
  std::vector<const uint8_t*> lines;
  std::vector<uint32_t> sums;
  std::vector<uint8_t> other;
};

/// Along a row, the lines are the row itself, moved by whole pixels over a margin that repeats its ends.
void blur_rows(const Pixels& p, const FractionalBox& box, Workspace& work) {
  const int64_t row = p.width * p.channels, margin = (box.radius + 1) * p.channels;
  work.other.resize(row + 2 * margin);
  uint8_t* wide = work.other.data();
  work.lines.resize(box.taps());
  for (int64_t k = 0; k < box.taps(); ++k) work.lines[k] = wide + k * p.channels;
  for (int64_t y = 0; y < p.height; ++y) {
    uint8_t* at = p.data + y * row;
    for (int pass = 0; pass < kPasses; ++pass) {
      std::memcpy(wide + margin, at, row);
      for (int64_t i = 0; i < margin; ++i) {
        wide[i] = at[i % p.channels];
        wide[margin + row + i] = at[row - p.channels + i % p.channels];
      }
      blur_lines(box, work.lines.data(), row, work.sums.data(), at);
    }
  }
}

void blur_columns(const Pixels& p, const FractionalBox& box, Workspace& work) {
  const int64_t row = p.width * p.channels;
  work.other.resize(p.bytes());
  work.lines.resize(box.taps());
  uint8_t *from = p.data, *to = work.other.data();
  for (int pass = 0; pass < kPasses; ++pass, std::swap(from, to))
    for (int64_t y = 0; y < p.height; ++y) {
      for (int64_t k = 0; k < box.taps(); ++k) work.lines[k] = from + std::clamp<int64_t>(y + k - box.radius - 1, 0, p.height - 1) * row;
      blur_lines(box, work.lines.data(), row, work.sums.data(), to + y * row);
    }
  if (from != p.data) std::memcpy(p.data, from, p.bytes());
}
}  // namespace

void gaussian_blur(const Pixels& p, double sigma) {
  check(sigma >= 0 && sigma <= kLargestBlur, "the standard deviation of a blur must lie in 0..", kLargestBlur, " pixels, it is ", sigma);
  if (sigma == 0 || p.bytes() == 0) return;
  thread_local Workspace work;
  work.sums.resize(p.width * p.channels);
  const FractionalBox box(box_radius(static_cast<float>(sigma)));
  blur_rows(p, box, work);
  blur_columns(p, box, work);
}

}  // namespace mesa::pixels
