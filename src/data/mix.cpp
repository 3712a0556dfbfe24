#include "mesa/data/mix.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "mesa/base/error.h"
#include "mesa/base/random.h"

namespace mesa {

MixMode parse_mix_mode(const std::string& text, const std::string& key) {
  if (text == "batch") return MixMode::batch;
  if (text == "pair") return MixMode::pair;
  check(text == "elem", key, " must be batch, pair or elem, it is '", text, "'");
  return MixMode::elem;
}

namespace {

/// A stream in the form that the standard library's distributions draw from.
struct Words {
  using result_type = uint32_t;
  static constexpr result_type min() { return 0; }
  static constexpr result_type max() { return std::numeric_limits<uint32_t>::max(); }
  result_type operator()() { return stream.next(); }
  RandomStream& stream;
};

/// Beta(alpha, alpha), as the share of one of two gamma variables in their sum.
double draw_beta(double alpha, RandomStream& random) {
  Words words{random};
  std::gamma_distribution<double> gamma(alpha);
  const double a = gamma(words), b = gamma(words);
  return a + b > 0 ? a / (a + b) : static_cast<double>(random.below(2));  // a tiny alpha leaves nothing but the ends
}

/// A box of the share 1 - `own` of the picture around a uniform centre, cut off at the edges; the share is what it then really is.
Mixing cut(double own, int64_t height, int64_t width, RandomStream& random) {
  const double side = std::sqrt(1 - own);
  const auto range = [&](int64_t extent) {
    const auto half = static_cast<int64_t>(static_cast<double>(extent) * side) / 2;
    const auto centre = static_cast<int64_t>(random.below(static_cast<uint64_t>(extent)));
    return std::pair{std::max<int64_t>(centre - half, 0), std::min(centre + half, extent)};
  };
  const auto [y0, y1] = range(height);
  const auto [x0, x1] = range(width);
  const double area = static_cast<double>((y1 - y0) * (x1 - x0)) / static_cast<double>(height * width);
  return {0, static_cast<float>(y0), static_cast<float>(x0), static_cast<float>(y1), static_cast<float>(x1), static_cast<float>(1 - area)};
}

Mixing draw(const MixOptions& options, RandomStream& random, int64_t height, int64_t width) {
  if (random.uniform() >= options.probability) return {};
  const bool both = options.mixup > 0 && options.cutmix > 0;
  const bool cuts = both ? random.uniform() < options.switch_probability : options.cutmix > 0;
  const double own = draw_beta(cuts ? options.cutmix : options.mixup, random);
  if (cuts) return cut(own, height, width, random);
  const auto share = static_cast<float>(own);
  return {share, 0, 0, static_cast<float>(height), static_cast<float>(width), share};
}

}  // namespace

std::vector<Mixing> draw_mixing(const MixOptions& options, uint64_t seed, const MixPlace& place, int64_t count, int64_t height,
                                int64_t width) {
  check(count % 2 == 0 && place.first % 2 == 0, "samples are mixed in pairs, and a batch of ", count, " has an odd one");
  std::vector<Mixing> all(static_cast<size_t>(count));
  if (options.off_epoch > 0 && place.epoch >= options.off_epoch) return all;
  RandomKey key = RandomKey::of(seed, "data.mix", static_cast<uint64_t>(place.epoch));
  key.key = mix64(key.key ^ mix64(static_cast<uint64_t>(place.batch)));
  for (int64_t b = 0; b < count; ++b) {
    const int64_t sample = place.first + b;
    const int64_t which = options.mode == MixMode::batch ? 0 : options.mode == MixMode::pair ? sample / 2 : sample;
    RandomKey own = key;
    own.key = mix64(key.key ^ mix64(static_cast<uint64_t>(which)));
    RandomStream random(own);
    all[static_cast<size_t>(b)] = draw(options, random, height, width);
  }
  return all;
}

}  // namespace mesa
