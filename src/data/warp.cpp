// Affine maps of a picture, as Pillow's Image.transform does them, in double.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <numbers>
#include <vector>

#include "mesa/data/pixels.h"

namespace mesa::pixels {
namespace {
double linear(double v0, double v1, double d) { return v0 + (v1 - v0) * d; }

/// Cubic convolution with a = -1 through v1 (d = 0) and v2 (d = 1), of ints or doubles.
template <class T>
double cubic(T v0, T v1, T v2, T v3, double d) {
  const double p2 = -v0 + v2, p3 = 2 * (v0 - v1) + v2 - v3, p4 = -v0 + v1 - v2 + v3;
  return v1 + d * (p2 + d * (p3 + d * p4));
}

/// The rows and columns of `taps` pixels around a place, those outside replaced by the outermost, and how far the place lies beyond the
/// middle pair's first.
template <int taps>
struct Neighbours {
  const uint8_t* row[taps];
  int64_t column[taps];
  double dx, dy;

  /// x and y, at least -1/2, count from the centre of the first pixel.
  Neighbours(const Pixels& from, double x, double y) {
    const int64_t left = x < 0 ? -1 : static_cast<int64_t>(x), top = y < 0 ? -1 : static_cast<int64_t>(y);
    dx = x - static_cast<double>(left);
    dy = y - static_cast<double>(top);
    for (int k = 0; k < taps; ++k) {
      const int64_t away = k - (taps / 2 - 1);
      row[k] = from.data + std::clamp<int64_t>(top + away, 0, from.height - 1) * from.width * from.channels;
      column[k] = std::clamp<int64_t>(left + away, 0, from.width - 1) * from.channels;
    }
  }
};

struct Bilinear {
  static constexpr int kTaps = 2;
  static double sample(const Neighbours<2>& at, int64_t c) {
    const auto along = [&](int k) { return linear(at.row[k][at.column[0] + c], at.row[k][at.column[1] + c], at.dx); };
    return at.dy == 0 ? along(0) : linear(along(0), along(1), at.dy);
  }
};

struct Bicubic {
  static constexpr int kTaps = 4;
  /// Shears and translations lie on the grid in one direction, where the cubic is its middle value.
  static double sample(const Neighbours<4>& at, int64_t c) {
    const auto along = [&](int k) -> double {
      const uint8_t* row = at.row[k] + c;
      if (at.dx == 0) return row[at.column[1]];
      return cubic<int>(row[at.column[0]], row[at.column[1]], row[at.column[2]], row[at.column[3]], at.dx);
    };
    return at.dy == 0 ? along(1) : cubic<double>(along(0), along(1), along(2), along(3), at.dy);
  }
};

template <class Filter>
void warp(const Pixels& from, const std::array<double, 6>& m, const Color& fill, uint8_t* out) {
  const auto height = static_cast<double>(from.height), width = static_cast<double>(from.width);
  for (int64_t row = 0; row < from.height; ++row)
    for (int64_t column = 0; column < from.width; ++column, out += from.channels) {
      const double x = static_cast<double>(column) + 0.5, y = static_cast<double>(row) + 0.5;
      const double from_x = m[0] * x + m[1] * y + m[2], from_y = m[3] * x + m[4] * y + m[5];
      if (!(from_x >= 0 && from_x < width && from_y >= 0 && from_y < height)) {
        std::memcpy(out, fill.data(), from.channels);
        continue;
      }
      const Neighbours<Filter::kTaps> at(from, from_x - 0.5, from_y - 0.5);
      for (int64_t c = 0; c < from.channels; ++c) out[c] = static_cast<uint8_t>(std::clamp(Filter::sample(at, c), 0.0, 255.0));
    }
}

/// Rounded to 15 decimal places, as Python's round does it.
double rounded(double x) {
  char text[32];
  const auto end = std::to_chars(text, text + sizeof text, x, std::chars_format::fixed, 15).ptr;
  std::from_chars(text, end, x);
  return x;
}
}  // namespace

void affine(const Pixels& p, const std::array<double, 6>& matrix, Interpolation interpolation, const Color& fill) {
  thread_local std::vector<uint8_t> before;
  before.assign(p.data, p.data + p.bytes());
  const Pixels from{before.data(), p.height, p.width, p.channels};
  if (interpolation == Interpolation::bicubic)
    warp<Bicubic>(from, matrix, fill, p.data);
  else
    warp<Bilinear>(from, matrix, fill, p.data);
}

void rotate(const Pixels& p, double degrees, Interpolation interpolation, const Color& fill) {
  double angle = std::fmod(degrees, 360);
  if (angle < 0) angle += 360;
  angle = -(angle * (std::numbers::pi / 180));
  const double cosine = rounded(std::cos(angle)), sine = rounded(std::sin(angle));
  const double x = static_cast<double>(p.width) / 2, y = static_cast<double>(p.height) / 2;
  affine(p, {cosine, sine, cosine * -x + sine * -y + x, -sine, cosine, -sine * -x + cosine * -y + y}, interpolation, fill);
}

}  // namespace mesa::pixels
