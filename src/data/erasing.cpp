#include "mesa/data/erasing.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "mesa/base/error.h"

namespace mesa {

ErasingMode parse_erasing_mode(const std::string& text, const std::string& key) {
  if (text == "const") return ErasingMode::constant;
  if (text == "rand") return ErasingMode::color;
  check(text == "pixel", key, " must be const, rand or pixel, it is '", text, "'");
  return ErasingMode::pixel;
}

namespace {
/// The bytes round(255 (mean + std n)), n ~ N(0, 1), clamped, by inversion: a random word finds its byte among the cumulative
/// probabilities in 2^-32. Erasing draws tens of thousands of them for a picture, which Box and Muller would make the dearest step of all.
class NormalBytes {
 public:
  NormalBytes(double mean, double std) {
    for (int v = 0; v < 255; ++v) {
      const double share = 0.5 * std::erfc(-((v + 0.5) / 255 - mean) / (std * std::sqrt(2.0)));
      up_to_[v] = static_cast<uint64_t>(share * 0x1p32);
    }
    up_to_[255] = uint64_t{1} << 32;
    int value = 0;
    for (uint64_t i = 0; i < 256; ++i) {
      while (up_to_[value] <= i << 24) ++value;
      first_[i] = static_cast<uint8_t>(value);
    }
  }
  uint8_t operator()(uint32_t word) const {
    int value = first_[word >> 24];
    while (up_to_[value] <= word) ++value;
    return static_cast<uint8_t>(value);
  }

 private:
  std::array<uint64_t, 256> up_to_;  // words below up_to_[v] give v or less
  std::array<uint8_t, 256> first_;   // of the words with these highest bits
};

/// Ten tries at a rectangle that is lower and narrower than the picture; an empty one where none is.
Box random_rectangle(const Pixels& p, const Erasing& erasing, int64_t count, RandomStream& random) {
  const double area = static_cast<double>(p.height * p.width) / static_cast<double>(count);
  for (int tries = 0; tries < 10; ++tries) {
    const double target = random.uniform(erasing.area[0], erasing.area[1]) * area;
    const double aspect = std::exp(random.uniform(std::log(erasing.aspect[0]), std::log(erasing.aspect[1])));
    const auto height = static_cast<int64_t>(std::nearbyint(std::sqrt(target * aspect)));
    const auto width = static_cast<int64_t>(std::nearbyint(std::sqrt(target / aspect)));
    if (height >= p.height || width >= p.width) continue;
    const auto y = static_cast<int64_t>(random.below(static_cast<uint64_t>(p.height - height + 1)));
    const auto x = static_cast<int64_t>(random.below(static_cast<uint64_t>(p.width - width + 1)));
    return {y, x, height, width};
  }
  return {};
}
}  // namespace

void erase(const Pixels& p, const Erasing& erasing, const std::vector<float>& mean, const std::vector<float>& std, RandomStream& random) {
  if (erasing.probability <= 0 || random.uniform() >= erasing.probability) return;
  std::vector<NormalBytes> noise;
  if (erasing.mode != ErasingMode::constant)
    for (int64_t c = 0; c < p.channels; ++c) noise.emplace_back(mean[c], std[c]);
  const int64_t count = erasing.max_count == 1 ? 1 : 1 + static_cast<int64_t>(random.below(static_cast<uint64_t>(erasing.max_count)));
  for (int64_t i = 0; i < count; ++i) {
    const Box box = random_rectangle(p, erasing, count, random);
    Color color = color_of(mean);
    if (erasing.mode == ErasingMode::color)
      for (int64_t c = 0; c < p.channels; ++c) color[c] = noise[c](random.next());
    for (int64_t y = box.y; y < box.y + box.height; ++y) {
      uint8_t* at = p.data + (y * p.width + box.x) * p.channels;
      for (int64_t x = 0; x < box.width; ++x, at += p.channels)
        for (int64_t c = 0; c < p.channels; ++c) at[c] = erasing.mode == ErasingMode::pixel ? noise[c](random.next()) : color[c];
    }
  }
}

}  // namespace mesa
