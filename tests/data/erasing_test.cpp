// Random erasing: how often, how large, what shape, and what is written.
#include "mesa/data/erasing.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <vector>

#include "support/data_files.h"

using namespace mesa;
using namespace mesa::testing;

namespace {
const std::vector<float> kMean{0.485f, 0.456f, 0.406f}, kStd{0.229f, 0.224f, 0.225f};

RandomStream stream(uint64_t seed, uint64_t index) { return RandomStream(RandomKey::of(seed, "erasing_test", index)); }

/// The rectangle around all pixels that are not 255, and how many those are.
struct Erased {
  int64_t top = 1 << 20, left = 1 << 20, bottom = -1, right = -1, count = 0;
  int64_t height() const { return bottom - top + 1; }
  int64_t width() const { return right - left + 1; }

  Erased(const Bytes& bytes, int64_t height, int64_t width) {
    for (int64_t y = 0; y < height; ++y)
      for (int64_t x = 0; x < width; ++x)
        if (bytes[(y * width + x) * 3] != 255) {
          top = std::min(top, y);
          left = std::min(left, x);
          bottom = std::max(bottom, y);
          right = std::max(right, x);
          ++count;
        }
  }
};

Bytes erased(const Erasing& erasing, uint64_t seed, uint64_t index, int64_t height, int64_t width) {
  Bytes bytes(height * width * 3, 255);
  RandomStream random = stream(seed, index);
  erase({bytes.data(), height, width, 3}, erasing, kMean, kStd, random);
  return bytes;
}
}  // namespace

TEST_CASE("a rectangle of random area and shape is erased with its probability", "[data][augment]") {
  const uint64_t seed = 41;
  INFO("seed " << seed);
  Erasing erasing;
  erasing.probability = 0.25;
  erasing.mode = ErasingMode::constant;
  const int64_t height = 60, width = 50;
  const int rounds = 8000;
  int happened = 0, corner = 0, far_corner = 0;
  double area = 0, log_aspect = 0;
  for (int i = 0; i < rounds; ++i) {
    const Bytes bytes = erased(erasing, seed, static_cast<uint64_t>(i), height, width);
    const Erased box(bytes, height, width);
    if (box.count == 0) continue;
    ++happened;
    REQUIRE(box.count == box.height() * box.width());  // a full rectangle
    REQUIRE(box.height() < height);
    REQUIRE(box.width() < width);
    const double share = static_cast<double>(box.count) / static_cast<double>(height * width);
    REQUIRE(share > 0.015);
    REQUIRE(share < 0.35);
    area += share;
    log_aspect += std::log(static_cast<double>(box.height()) / static_cast<double>(box.width()));
    corner += box.top == 0 && box.left == 0;
    far_corner += box.bottom == height - 1 && box.right == width - 1;
    const uint8_t* at = &bytes[(box.top * width + box.left) * 3];
    REQUIRE(Bytes(at, at + 3) == Bytes{124, 116, 104});  // the mean
  }
  CHECK(std::abs(happened - rounds / 4) < 195);                             // five standard deviations
  CHECK(area / happened == Approx((0.02 + 1.0 / 3) / 2).margin(0.02));      // long ones that do not fit pull it down a little
  CHECK(std::fabs(log_aspect / happened - std::log(60.0 / 50) / 3) < 0.2);  // and favour the picture's own shape
  CHECK(corner > 0);
  CHECK(far_corner > 0);
  erasing.probability = 0;
  CHECK(Erased(erased(erasing, seed, 1, height, width), height, width).count == 0);
}

TEST_CASE("several rectangles share the area", "[data][augment]") {
  const uint64_t seed = 43;
  INFO("seed " << seed);
  Erasing erasing;
  erasing.probability = 1;
  erasing.mode = ErasingMode::constant;
  erasing.max_count = 3;
  int full = 0, rounds = 300;
  for (int i = 0; i < rounds; ++i) {
    const Erased box(erased(erasing, seed, static_cast<uint64_t>(i), 64, 64), 64, 64);
    REQUIRE(box.count > 0);
    CHECK(box.count <= 64 * 64 * 0.35);
    full += box.count == box.height() * box.width();
  }
  CHECK(full > rounds / 5);  // one rectangle in a third of the pictures
  CHECK(full < rounds / 2);
}

TEST_CASE("erased pixels are the normalization's noise, in one colour or pixel by pixel", "[data][augment]") {
  const uint64_t seed = 47;
  INFO("seed " << seed);
  Erasing erasing;
  erasing.probability = 1;
  erasing.area[0] = erasing.area[1] = 0.9;
  erasing.aspect[0] = erasing.aspect[1] = 1;
  const int64_t side = 200;
  const auto values_of = [&](ErasingMode mode, uint64_t index, int channel) {
    erasing.mode = mode;
    Bytes bytes(side * side * 3, 255);
    RandomStream random = stream(seed, index);
    erase({bytes.data(), side, side, 3}, erasing, kMean, kStd, random);
    std::vector<double> values;
    const int64_t margin = side / 10;  // inside the rectangle wherever it lies
    for (int64_t y = margin; y < side - margin; ++y)
      for (int64_t x = margin; x < side - margin; ++x) values.push_back(bytes[(y * side + x) * 3 + channel]);
    return values;
  };
  for (int c = 0; c < 3; ++c) {
    const auto values = values_of(ErasingMode::pixel, 1, c);
    const auto n = static_cast<double>(values.size());
    // Each byte against the share of the normal distribution that is rounded to it: chi-squared of the 254 inner ones.
    std::vector<double> counts(256, 0);
    for (double v : values) ++counts[static_cast<size_t>(v)];
    const auto below = [&](double byte) { return 0.5 * std::erfc(-(byte / 255 - kMean[c]) / (kStd[c] * std::sqrt(2.0))); };
    double chi = (counts[0] - n * below(0.5)) * (counts[0] - n * below(0.5)) / (n * below(0.5));
    for (int v = 1; v < 255; ++v) {
      const double expected = n * (below(v + 0.5) - below(v - 0.5));
      chi += (counts[v] - expected) * (counts[v] - expected) / expected;
    }
    chi += (counts[255] - n * (1 - below(254.5))) * (counts[255] - n * (1 - below(254.5))) / (n * (1 - below(254.5)));
    CHECK(chi < 255 + 5 * std::sqrt(2 * 255.0));
    CHECK(counts[0] > 0.01 * n);  // clamped
    const auto color = values_of(ErasingMode::color, static_cast<uint64_t>(2 + c), c);
    CHECK(std::all_of(color.begin(), color.end(), [&](double v) { return v == color[0]; }));
  }
  CHECK(values_of(ErasingMode::color, 2, 0)[0] != values_of(ErasingMode::color, 3, 0)[0]);
  CHECK(values_of(ErasingMode::constant, 2, 1)[0] == 116);
}

TEST_CASE("a picture that no rectangle fits into stays, and modes have names", "[data][augment]") {
  Erasing erasing;
  erasing.probability = 1;
  CHECK(Erased(erased(erasing, 1, 1, 1, 1), 1, 1).count == 0);
  CHECK(parse_erasing_mode("const", "key") == ErasingMode::constant);
  CHECK(parse_erasing_mode("rand", "key") == ErasingMode::color);
  CHECK(parse_erasing_mode("pixel", "key") == ErasingMode::pixel);
  CHECK_THAT(error_of([] { parse_erasing_mode("noise", "data.erasing_mode"); }), Catch::Contains("data.erasing_mode must be const, rand"));
}
