// Resampling against its definition, value by value: whatever the vectors do, the bytes are those of Pillow's fixed-point sums.
#include "mesa/data/resize.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>

#include "mesa/base/random.h"
#include "support/data_files.h"

using namespace mesa;
using namespace mesa::testing;

namespace {
double filter(Interpolation interpolation, double x) {
  x = std::fabs(x);
  if (interpolation == Interpolation::bilinear) return std::max(0.0, 1 - x);
  return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

/// One output value of a row of `in` values resized to `out`, as Pillow computes it: weights of 22 bits, a sum, rounding, clamping.
template <class At>
uint8_t resampled(const At& at, int64_t in, int64_t out, int64_t i, Interpolation interpolation) {
  const double scale = static_cast<double>(in) / static_cast<double>(out), stretch = std::max(scale, 1.0);
  const double support = (interpolation == Interpolation::bicubic ? 2 : 1) * stretch, center = (static_cast<double>(i) + 0.5) * scale;
  const auto low = std::max<int64_t>(0, static_cast<int64_t>(center - support + 0.5));
  const auto high = std::min(in, static_cast<int64_t>(center + support + 0.5));
  double norm = 0;
  for (int64_t k = low; k < high; ++k) norm += filter(interpolation, (static_cast<double>(k) - center + 0.5) / stretch);
  int64_t sum = 1 << 21;
  for (int64_t k = low; k < high; ++k) {
    const double w = filter(interpolation, (static_cast<double>(k) - center + 0.5) / stretch) / norm * (1 << 22);
    sum += static_cast<int64_t>(w + (w < 0 ? -0.5 : 0.5)) * at(k);
  }
  return static_cast<uint8_t>(std::clamp<int64_t>(sum >> 22, 0, 255));
}

Bytes reference(const Image& image, int64_t height, int64_t width, Interpolation interpolation) {
  const int64_t c = image.channels;
  Bytes narrow(image.height * width * c), out(height * width * c);
  for (int64_t y = 0; y < image.height; ++y)
    for (int64_t x = 0; x < width * c; ++x)
      narrow[y * width * c + x] =
          resampled([&](int64_t k) { return image.pixels[(y * image.width + k) * c + x % c]; }, image.width, width, x / c, interpolation);
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < width * c; ++x)
      out[y * width * c + x] = resampled([&](int64_t k) { return narrow[k * width * c + x]; }, image.height, height, y, interpolation);
  return out;
}
}  // namespace

TEST_CASE("resize: every size, channel and filter gives the bytes of the definition", "[data][resize]") {
  struct Case {
    int height, width, to_height, to_width;
  };
  for (const Case& c :
       {Case{130, 97, 40, 50}, {33, 200, 33, 20}, {70, 64, 20, 64}, {9, 5, 31, 80}, {300, 301, 4, 3}, {1, 1, 5, 40}, {65, 129, 64, 128}})
    for (const int channels : {1, 3})
      for (const auto interpolation : {Interpolation::bilinear, Interpolation::bicubic}) {
        INFO(c.height << " x " << c.width << " to " << c.to_height << " x " << c.to_width << ", " << channels);
        Image image{c.height, c.width, channels, Bytes(static_cast<size_t>(c.height) * c.width * channels)};
        RandomStream random(RandomKey::of(3, "resize_test", 0));
        for (uint8_t& v : image.pixels)
          v = static_cast<uint8_t>(random.below(2) == 0 ? random.below(256) : random.below(2) * 255);  // cubics overshoot
        const Bytes expected = reference(image, c.to_height, c.to_width, interpolation);
        Bytes out(expected.size());
        resize(image, {0, 0, c.height, c.width}, c.to_height, c.to_width, {0, 0, c.to_height, c.to_width}, interpolation, out.data());
        CHECK(out == expected);
        const Box part{c.to_height / 3, c.to_width / 3, c.to_height - c.to_height / 2, c.to_width - c.to_width / 2};
        Bytes window(part.height * part.width * channels);
        resize(image, {0, 0, c.height, c.width}, c.to_height, c.to_width, part, interpolation, window.data());
        bool same = true;
        for (int64_t y = 0; y < part.height; ++y)
          same = same && std::equal(&window[y * part.width * channels], &window[y * part.width * channels] + part.width * channels,
                                    &expected[((part.y + y) * c.to_width + part.x) * channels]);
        CHECK(same);
      }
}
