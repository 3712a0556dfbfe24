// Mixup and CutMix: what is drawn, how often, and that any number of ranks draws the same.
#include "mesa/data/mix.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <set>

#include "mesa/base/error.h"
#include "support/random.h"

using namespace mesa;
using namespace mesa::testing;

namespace {

constexpr int64_t kSide = 32;

std::vector<Mixing> draw(const MixOptions& options, int64_t batch, int64_t count = 8) {
  return draw_mixing(options, test_seed(), {0, batch, 0}, count, kSide, kSide);
}
bool is_none(const Mixing& m) { return m.inside == 1 && m.share == 1; }
bool is_mixup(const Mixing& m) { return m.y0 == 0 && m.x0 == 0 && m.y1 == kSide && m.x1 == kSide && m.inside == m.share; }
bool is_cut(const Mixing& m) {
  const float area = (m.y1 - m.y0) * (m.x1 - m.x0) / (kSide * kSide);
  return m.inside == 0 && m.y0 <= m.y1 && m.x0 <= m.x1 && m.y0 >= 0 && m.x0 >= 0 && m.y1 <= kSide && m.x1 <= kSide &&
         std::fabs(m.share - (1 - area)) < 1e-6f;
}
bool same(const Mixing& a, const Mixing& b) {
  return a.inside == b.inside && a.y0 == b.y0 && a.x0 == b.x0 && a.y1 == b.y1 && a.x1 == b.x1 && a.share == b.share;
}

}  // namespace

TEST_CASE("mixing: the own share is Beta distributed, and a box covers the rest", "[data]") {
  INFO(seed_note());
  for (const double alpha : {0.2, 0.8, 1.0, 4.0}) {
    CAPTURE(alpha);
    constexpr int n = 4000;
    double sum = 0, squares = 0, area = 0;
    for (int i = 0; i < n; ++i) {
      const Mixing m = draw({alpha, 0}, i)[0];
      REQUIRE(is_mixup(m));
      sum += m.share, squares += m.share * m.share;
      const Mixing box = draw({0, alpha}, i)[0];
      REQUIRE(is_cut(box));
      area += 1 - box.share;
    }
    const double mean = sum / n, variance = squares / n - mean * mean, want = 1 / (4 * (2 * alpha + 1));  // of Beta(alpha, alpha)
    CHECK(std::fabs(mean - 0.5) < 5 * std::sqrt(want / n));
    CHECK(std::fabs(variance / want - 1) < 0.12);
    CHECK(area / n > 0.2);  // of half the area the edges cut off something
    CHECK(area / n < 0.5);
  }
}

TEST_CASE("mixing: probabilities of any, and of the two kinds", "[data]") {
  INFO(seed_note());
  MixOptions options{0.8, 1.0};
  options.probability = 0.6, options.switch_probability = 0.25;
  constexpr int n = 4000;
  int none = 0, mixup = 0, cuts = 0;
  for (int i = 0; i < n; ++i) {
    const Mixing m = draw(options, i)[0];
    none += is_none(m), mixup += !is_none(m) && is_mixup(m), cuts += !is_none(m) && is_cut(m);
  }
  CHECK(none + mixup + cuts >= n - 2);  // a box without a pixel is none, too
  const auto near = [&](int count, double p) { return std::fabs(count - n * p) < 5 * std::sqrt(n * p * (1 - p)); };
  CHECK(near(none, 0.4));
  CHECK(near(mixup, 0.6 * 0.75));
  CHECK(near(cuts, 0.6 * 0.25));
}

TEST_CASE("mixing: one draw a batch, a pair or a sample, and none from the last epochs on", "[data]") {
  INFO(seed_note());
  MixOptions options{0.8, 0};  // the shares of boxes are fractions of so many pixels, and may coincide
  const auto distinct = [](const std::vector<Mixing>& all) {
    std::set<float> shares;
    for (const Mixing& m : all) shares.insert(m.share);
    return shares.size();
  };
  CHECK(distinct(draw(options, 1)) == 1);
  CHECK_FALSE(same(draw(options, 1)[0], draw(options, 2)[0]));
  options.mode = MixMode::pair;
  const std::vector<Mixing> pairs = draw(options, 1);
  CHECK(distinct(pairs) == 4);
  for (int64_t b = 0; b < 8; ++b) CHECK(same(pairs[b], pairs[Mixing::partner(b)]));
  options.mode = MixMode::elem;
  CHECK(distinct(draw(options, 1)) == 8);
  options.off_epoch = 3;
  const auto in_epoch = [&](int64_t epoch) { return draw_mixing(options, 1, {epoch, 0, 0}, 8, kSide, kSide); };
  CHECK_FALSE(is_none(in_epoch(2)[0]));
  for (const Mixing& m : in_epoch(3)) CHECK(is_none(m));
  CHECK_FALSE(same(in_epoch(1)[0], in_epoch(2)[0]));
  CHECK_THROWS_AS(draw(options, 0, 7), Error);
}

TEST_CASE("mixing: any number of ranks mixes a global batch alike, each with partners of its own", "[data]") {
  for (const MixMode mode : {MixMode::batch, MixMode::pair, MixMode::elem})
    for (const int64_t ranks : {1, 2, 4}) {
      CAPTURE(static_cast<int>(mode), ranks);
      MixOptions options{0.8, 1.0};
      options.mode = mode;
      const std::vector<Mixing> whole = draw(options, 5, 16);
      const int64_t count = 16 / ranks;
      for (int64_t rank = 0; rank < ranks; ++rank) {
        const std::vector<Mixing> part = draw_mixing(options, test_seed(), {0, 5, rank * count}, count, kSide, kSide);
        for (int64_t b = 0; b < count; ++b) {
          CHECK(same(part[b], whole[rank * count + b]));
          CHECK(Mixing::partner(b) < count);
        }
      }
    }
}
