// The codec against a reference that follows the contract element by element, on every instruction set this CPU has.
#include "mesa/kernels/codec.h"

#include <omp.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <functional>
#include <limits>
#include <random>

#include "support/device.h"
#include "support/random.h"
#include "support/worst.h"

using namespace mesa;
using namespace mesa::testing;
using kernels::GroupLayout;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();

struct Level {
  std::string name;
  std::function<decltype(kernels::plain::group_range)> group_range;
  std::function<decltype(kernels::plain::quantize)> quantize;
  std::function<decltype(kernels::plain::quantize_current)> quantize_current;
  std::function<decltype(kernels::plain::dequantize)> dequantize;
};

/// The plain kernels first, then the others that this CPU has, or CUDA's: all must give the same bits.
std::vector<Level> levels() {
#define MESA_LEVEL(isa, wrap)                                                                                      \
  Level{#isa, wrap(kernels::isa::group_range), wrap(kernels::isa::quantize), wrap(kernels::isa::quantize_current), \
        wrap(kernels::isa::dequantize)}
  std::vector<Level> all = {MESA_LEVEL(plain, )};
  if (test_device() == kCuda) return {all[0], MESA_LEVEL(cuda, staged)};
  if (cpu_isa() >= Isa::avx2) all.push_back(MESA_LEVEL(avx2, ));
  if (cpu_isa() >= Isa::avx512) all.push_back(MESA_LEVEL(avx512, ));
#undef MESA_LEVEL
  return all;
}

Tensor random_tensor(const Shape& shape, DType dtype, uint64_t seed) {
  std::mt19937_64 gen(seed);
  std::normal_distribution<double> normal(0.3, 2.0);
  const Tensor x = Tensor::empty(shape, dtype);
  for (int64_t i = 0; i < x.numel(); ++i) {
    const double value = normal(gen);
    if (dtype == DType::f64)
      x.data<double>()[i] = value;
    else if (dtype == DType::f32)
      x.data<float>()[i] = static_cast<float>(value);
    else
      x.data<bf16>()[i] = bf16(static_cast<float>(value));
  }
  return x;
}

int64_t group_of(const GroupLayout& layout, int64_t e) { return e / layout.inner % layout.groups; }
Tensor floats(int64_t n, float value = 0) { return Tensor::from({n}, std::vector<float>(n, value)); }
Tensor code_tensor(int64_t n, int bits) { return Tensor::from({(n * bits + 7) / 8}, std::vector<uint8_t>((n * bits + 7) / 8, 0xee)); }

/// Packed codes of one tensor with everything that tells how they came about.
struct Coded {
  std::vector<uint8_t> codes;
  std::vector<float> step, offset, lo, hi;
  struct {
    int64_t saturated = 0, nonfinite = 0;
  } odd;
};

void require_same(const Coded& a, const Coded& b) {
  REQUIRE(a.codes == b.codes);
  REQUIRE(a.step == b.step);
  REQUIRE(a.offset == b.offset);
  REQUIRE(a.lo == b.lo);
  REQUIRE(a.hi == b.hi);
  REQUIRE(a.odd.saturated == b.odd.saturated);
  REQUIRE(a.odd.nonfinite == b.odd.nonfinite);
}

void reference_range(const std::vector<float>& x, const GroupLayout& layout, Coded& out) {
  out.lo.assign(layout.groups, kInf);
  out.hi.assign(layout.groups, -kInf);
  for (size_t e = 0; e < x.size(); ++e) {
    const int64_t g = group_of(layout, e);
    if (!std::isfinite(x[e]))
      ++out.odd.nonfinite;
    else
      out.lo[g] = std::min(out.lo[g], x[e]), out.hi[g] = std::max(out.hi[g], x[e]);
  }
  for (int64_t g = 0; g < layout.groups; ++g) {
    if (out.lo[g] > out.hi[g]) out.lo[g] = out.hi[g] = 0;
  }
}

void reference_codes(const std::vector<float>& x, const GroupLayout& layout, int bits, bool stochastic, RandomKey key, Coded& out) {
  const int top = (1 << bits) - 1;
  out.codes.assign((x.size() * bits + 7) / 8, 0);
  for (size_t e = 0; e < x.size(); ++e) {
    const int64_t g = group_of(layout, e);
    const float step = out.step[g], inverse = std::isfinite(1.0f / step) ? 1.0f / step : 0.0f, d = x[e] - out.offset[g];
    const uint32_t word = philox(e / 8, key.step, key.key).word[e % 8 / 2];
    const uint32_t h = e % 2 ? word >> 16 : word & 0xffff;
    const float v = std::floor(std::fma(d, inverse, stochastic ? (h + 0.5f) / 65536.0f : 0.5f));
    const int q = std::isnan(v) ? 0 : static_cast<int>(std::min(std::max(v, 0.0f), static_cast<float>(top)));
    if (std::isfinite(x[e]) && (d < -1e-3f * step || d > step * (top + 1e-3f))) ++out.odd.saturated;
    out.codes[e * bits / 8] |= static_cast<uint8_t>(q << e * bits % 8);
  }
}

/// What a kernel makes of x, by given scales (quantize) or by current ones where `scales` is null.
Coded run(const Level& level, const Tensor& x, const GroupLayout& layout, int bits, bool stochastic, RandomKey key, const Coded* scales) {
  Coded out;
  const Tensor lo = floats(layout.groups), hi = floats(layout.groups), codes = code_tensor(x.numel(), bits);
  const Tensor step = scales ? Tensor::from({layout.groups}, scales->step) : floats(layout.groups);
  const Tensor offset = scales ? Tensor::from({layout.groups}, scales->offset) : floats(layout.groups);
  const Tensor counts = Tensor::zeros({2}, DType::i64);
  if (scales) {
    level.quantize(x, layout, bits, stochastic, key, step, offset, codes, lo, hi, counts);
    const Tensor unwatched = code_tensor(x.numel(), bits);
    level.quantize(x, layout, bits, stochastic, key, step, offset, unwatched, {}, {}, {});
    REQUIRE(unwatched.to_vector<uint8_t>() == codes.to_vector<uint8_t>());
  } else {
    level.quantize_current(x, layout, bits, stochastic, key, step, offset, codes, counts);
    level.group_range(x, layout, lo, hi, {});
  }
  out.odd = {counts.data<int64_t>()[0], counts.data<int64_t>()[1]};
  out.codes = codes.to_vector<uint8_t>();
  out.step = step.to_vector<float>(), out.offset = offset.to_vector<float>();
  out.lo = lo.to_vector<float>(), out.hi = hi.to_vector<float>();
  return out;
}

Coded reference(const Tensor& x, const GroupLayout& layout, int bits, bool stochastic, RandomKey key, const Coded* scales = nullptr) {
  const std::vector<float> values = x.to_vector<float>();
  Coded out;
  reference_range(values, layout, out);
  out.offset = scales ? scales->offset : out.lo;
  if (scales)
    out.step = scales->step;
  else
    for (int64_t g = 0; g < layout.groups; ++g) out.step.push_back((out.hi[g] - out.lo[g]) / static_cast<float>((1 << bits) - 1));
  reference_codes(values, layout, bits, stochastic, key, out);
  return out;
}

/// Decodes on every level; the levels must agree.
std::vector<float> decode(const Coded& coded, const GroupLayout& layout, int bits, int64_t n, DType dtype = DType::f32) {
  std::vector<float> first;
  for (const Level& level : levels()) {
    const Tensor y = Tensor::empty({n}, dtype), codes = Tensor::from({static_cast<int64_t>(coded.codes.size())}, coded.codes);
    level.dequantize(codes, layout, bits, Tensor::from({layout.groups}, coded.step), Tensor::from({layout.groups}, coded.offset), y);
    if (level.name == "plain")
      first = y.to_vector<float>();
    else
      REQUIRE(y.to_vector<float>() == first);
  }
  return first;
}

struct Case {
  const char* name;
  std::function<Tensor(DType, uint64_t)> x;
  GroupLayout layout;
};

std::function<Tensor(DType, uint64_t)> dense(const Shape& shape) {
  return [shape](DType dtype, uint64_t seed) { return random_tensor(shape, dtype, seed); };
}

/// The middle third of rows three times as wide, as q, k and v lie in one product.
std::function<Tensor(DType, uint64_t)> middle_third(int64_t b, int64_t n, int64_t c) {
  return [=](DType dtype, uint64_t seed) { return random_tensor({b, n, 3 * c}, dtype, seed).narrow(2, c, c); };
}

std::vector<Case> cases() {
  return {
      {"heads of 64, many threads", dense({3, 67, 192}), {3 * 67, 3, 64}},
      {"heads of 32, strided", middle_third(2, 61, 96), {2 * 61, 3, 32}},
      {"heads of 50, strided", middle_third(2, 11, 150), {2 * 11, 3, 50}},
      {"heads before tokens", dense({2, 3, 197, 16}), {2, 3, 197 * 16}},
      {"channels", dense({7, 29, 100}), {7 * 29, 100, 1}},
      {"channels, strided", middle_third(5, 41, 97), {5 * 41, 97, 1}},
      {"groups of 5 channels", dense({13, 35}), {13, 7, 5}},
      {"groups of 3 channels, too many for tables", dense({3, 9000}), {3, 3000, 3}},
      {"one group", dense({3, 5, 1500}), {1, 1, 3 * 5 * 1500}},
      {"runs of 256, the last short", dense({3, 43, 130}), {1, 66, 256, true}},
      {"runs of 256 across strided rows", middle_third(3, 43, 130), {1, 66, 256, true}},
      {"runs of 100", dense({4001}), {1, 41, 100, true}},
      {"runs of 7, the last short", dense({100, 11}), {1, 158, 7, true}},
      {"runs of 1500", dense({20000}), {1, 14, 1500, true}},
      {"runs of 20000", dense({70001}), {1, 4, 20000, true}},
      {"a scalar", dense({}), {1, 1, 1}},
  };
}

}  // namespace

TEST_CASE("codes, ranges and counts equal the reference in every layout, dtype and instruction set", "[codec]") {
  const uint64_t seed = test_seed();
  INFO("MESA_TEST_SEED=" << seed);
  for (const Case& c : cases()) {
    for (DType dtype : {DType::f32, DType::bf16, DType::f64}) {
      const Tensor x = c.x(dtype, seed);
      for (int bits : {8, 4, 2}) {
        for (bool stochastic : {false, true}) {
          const RandomKey key{mix64(seed), (uint64_t{7} << 32) + 5};
          const Coded current = reference(x, c.layout, bits, stochastic, key);
          Coded narrow = current;  // about a tenth of the range is cut off, so that elements saturate at both ends
          for (int64_t g = 0; g < c.layout.groups; ++g) narrow.offset[g] += narrow.step[g] * 0.05f * bits, narrow.step[g] *= 0.9f;
          const Coded given = reference(x, c.layout, bits, stochastic, key, &narrow);
          for (const Level& level : levels()) {
            INFO(c.name << ", " << to_string(dtype) << ", " << bits << " bits, stochastic " << stochastic << ", " << level.name);
            require_same(run(level, x, c.layout, bits, stochastic, key, nullptr), current);
            require_same(run(level, x, c.layout, bits, stochastic, key, &narrow), given);
          }
        }
      }
    }
  }
}

TEST_CASE("decoding is fma(code, step, offset), rounded to the output's dtype", "[codec]") {
  const uint64_t seed = test_seed();
  INFO("MESA_TEST_SEED=" << seed);
  for (const Case& c : cases()) {
    const Tensor x = c.x(DType::f32, seed);
    const int64_t n = x.numel();
    for (int bits : {8, 4, 2}) {
      const Coded coded = reference(x, c.layout, bits, true, {seed, 1});
      std::vector<float> expected(n), rounded(n);
      for (int64_t e = 0; e < n; ++e) {
        const int64_t g = group_of(c.layout, e);
        const int q = coded.codes[e * bits / 8] >> e * bits % 8 & ((1 << bits) - 1);
        expected[e] = std::fma(static_cast<float>(q), coded.step[g], coded.offset[g]);
        rounded[e] = bf16(expected[e]);
      }
      INFO(c.name << ", " << bits << " bits");
      REQUIRE(decode(coded, c.layout, bits, n) == expected);
      REQUIRE(decode(coded, c.layout, bits, n, DType::f64) == expected);
      REQUIRE(decode(coded, c.layout, bits, n, DType::bf16) == rounded);
    }
  }
}

TEST_CASE("the round trip errs by at most a step, by half a step when rounding to nearest", "[codec]") {
  const uint64_t seed = test_seed();
  INFO("MESA_TEST_SEED=" << seed);
  for (int64_t n : {0, 1, 7, 255, 256, 257, 20001}) {
    const Tensor x = random_tensor({n}, DType::f32, seed);
    const std::vector<float> values = x.to_vector<float>();
    const GroupLayout layout{1, (n + 255) / 256, 256, true};
    for (int bits : {8, 4, 2}) {
      for (bool stochastic : {false, true}) {
        const Coded coded = run(levels().back(), x, layout, bits, stochastic, {seed, 3}, nullptr);
        const std::vector<float> y = decode(coded, layout, bits, n);
        float worst = 0;  // in steps
        for (int64_t e = 0; e < n; ++e) {
          const float step = coded.step[e / 256];
          worst = worse(worst, step == 0 ? (y[e] != values[e] ? kInf : 0.0f) : std::abs(y[e] - values[e]) / step);
        }
        INFO(n << " elements, " << bits << " bits, stochastic " << stochastic);
        REQUIRE(worst <= (stochastic ? 1.0f : 0.5f) * 1.0005f);
        REQUIRE(coded.odd.saturated == 0);
      }
    }
  }
}

TEST_CASE("values outside the range decode to its ends and never wrap", "[codec]") {
  const std::vector<float> values = {-1e30f, -5, -0.01f, 0, 0.5f, 1, 1.01f, 5, 256.0f / 255, 1e10f, 1e30f, kInf, -kInf};
  const int64_t n = static_cast<int64_t>(values.size());
  const GroupLayout layout{1, 1, n};
  for (int bits : {8, 4, 2}) {
    for (bool stochastic : {false, true}) {
      Coded scales;
      scales.step = {1.0f / ((1 << bits) - 1)}, scales.offset = {0.0f};
      for (const Level& level : levels()) {
        const Coded coded = run(level, Tensor::from({n}, values), layout, bits, stochastic, {1, 2}, &scales);
        const std::vector<float> y = decode(coded, layout, bits, n);
        for (int64_t e = 0; e < n; ++e) {
          INFO(values[e] << " -> " << y[e] << ", " << bits << " bits, " << level.name);
          if (values[e] <= -scales.step[0])
            REQUIRE(y[e] == 0.0f);
          else if (values[e] >= 1 + scales.step[0])
            REQUIRE(y[e] == Approx(1.0f));
          else
            REQUIRE(std::abs(y[e] - std::min(std::max(values[e], 0.0f), 1.0f)) <= scales.step[0] * 1.0005f);
        }
        REQUIRE(coded.odd.saturated == 8);
        REQUIRE(coded.odd.nonfinite == 2);
        REQUIRE(coded.lo[0] == -1e30f);
        REQUIRE(coded.hi[0] == 1e30f);
      }
    }
  }
}

TEST_CASE("stochastic rounding is unbiased inside the range", "[codec]") {
  constexpr int64_t kElements = 203, kSteps = 4000;
  const Tensor x = random_tensor({kElements}, DType::f32, 11);
  const std::vector<float> values = x.to_vector<float>();
  const GroupLayout layout{1, 1, kElements};
  const Tensor step = floats(1), offset = floats(1), y = Tensor::empty({kElements}, DType::f32);
  for (int bits : {8, 4, 2}) {
    const Tensor codes = code_tensor(kElements, bits);
    std::vector<double> sum(kElements), squares(kElements);
    for (uint64_t s = 0; s < kSteps; ++s) {
      kernels::quantize_current(x, layout, bits, true, RandomKey::of(12, "blocks.0.mlp.gelu:x", s), step, offset, codes, Tensor());
      kernels::dequantize(codes, layout, bits, step, offset, y);
      for (int64_t e = 0; e < kElements; ++e) {
        const double error = double{y.data<float>()[e]} - values[e];
        sum[e] += error, squares[e] += error * error;
      }
    }
    double total = 0, total_variance = 0;
    for (int64_t e = 0; e < kElements; ++e) {
      // Below one expected event in kSteps the sample variance says nothing; the floor is the variance of about five.
      const double mean = sum[e] / kSteps, width = step.data<float>()[0];
      const double variance = std::max(squares[e] / kSteps - mean * mean, 5.0 / kSteps * width * width);
      INFO(bits << " bits, element " << e << ", mean error in steps " << mean / width);
      REQUIRE(std::abs(mean) <= 5 * std::sqrt(variance / kSteps));
      total += mean, total_variance += variance / kSteps;
    }
    REQUIRE(std::abs(total) <= 5 * std::sqrt(total_variance));
  }
}

TEST_CASE("what is not finite is counted, coded and kept out of the ranges", "[codec]") {
  const std::vector<GroupLayout> layouts = {{1, 4, 512, true}, {32, 2, 32}, {128, 16, 1}, {1, 1, 2048}};
  std::vector<float> values = random_tensor({2048}, DType::f32, 5).to_vector<float>();
  values[0] = kNan, values[100] = kInf, values[1023] = -kInf, values[1024] = -kNan, values[2047] = kInf;
  for (const GroupLayout& layout : layouts) {
    for (DType dtype : {DType::f32, DType::bf16, DType::f64}) {
      Tensor x = Tensor::empty({2048}, dtype);
      dispatch_float(dtype, [&](auto tag) {
        for (int e = 0; e < 2048; ++e) x.data<decltype(tag)>()[e] = static_cast<decltype(tag)>(values[e]);
      });
      const Coded current = reference(x, layout, 4, true, {9, 9});
      REQUIRE(current.odd.nonfinite == 5);
      for (const Level& level : levels()) {
        INFO("groups " << layout.groups << ", " << to_string(dtype) << ", " << level.name);
        require_same(run(level, x, layout, 4, true, {9, 9}, nullptr), current);
        require_same(run(level, x, layout, 4, true, {9, 9}, &current), reference(x, layout, 4, true, {9, 9}, &current));
        const Tensor counts = Tensor::from<int64_t>({2}, {3, 4});  // counts are added
        level.group_range(x, layout, floats(layout.groups), floats(layout.groups), counts);
        REQUIRE(counts.to_vector<int64_t>() == std::vector<int64_t>{3, 9});
      }
    }
  }
  for (const Level& level : levels()) {  // a group with nothing finite has the range [0, 0]
    const Coded coded = run(level, Tensor::from<float>({3}, {kNan, kInf, kNan}), {1, 1, 3}, 8, true, {}, nullptr);
    REQUIRE((coded.lo[0] == 0 && coded.hi[0] == 0 && coded.step[0] == 0 && coded.codes == std::vector<uint8_t>{0, 0, 0}));
  }
}

TEST_CASE("constant groups decode exactly, and so do ranges too small to divide by", "[codec]") {
  const GroupLayout layout{1, 4, 256, true};
  std::vector<float> values(1024, -3.7f);
  for (int e = 256; e < 512; ++e) values[e] = 1e-40f * (e % 2);        // a step of 4e-43: its inverse is infinite
  for (int e = 512; e < 768; ++e) values[e] = e % 2 ? 3e38f : -3e38f;  // hi - lo is infinite
  for (int e = 768; e < 1024; ++e) values[e] = 1e-36f * static_cast<float>(e % 256) / 255.0f;
  for (const Level& level : levels()) {
    const Coded coded = run(level, Tensor::from({1024}, values), layout, 8, true, {3, 1}, nullptr);
    const std::vector<float> y = decode(coded, layout, 8, 1024);
    for (int e = 0; e < 1024; ++e) {
      INFO("element " << e << ": " << values[e] << " -> " << y[e] << ", " << level.name);
      if (e < 256)
        REQUIRE((y[e] == values[e] && coded.codes[e] == 0));
      else if (e < 512)
        REQUIRE((y[e] == 0.0f && coded.codes[e] == 0));
      else if (e < 768)
        REQUIRE(y[e] == Approx(values[e]));
      else
        REQUIRE(std::abs(y[e] - values[e]) <= 1.001e-36f / 255);
    }
    REQUIRE(coded.step[0] == 0.0f);
    REQUIRE((coded.odd.saturated == 0 && coded.odd.nonfinite == 0));
  }
}

TEST_CASE("the number of threads changes nothing", "[codec]") {
  const uint64_t seed = test_seed();
  INFO("MESA_TEST_SEED=" << seed);
  const Tensor x = random_tensor({4, 197, 192}, DType::f32, seed);
  const int before = omp_get_max_threads();
  for (const GroupLayout& layout : {GroupLayout{4 * 197, 3, 64}, {4 * 197, 192, 1}, {1, 591, 256, true}, {4, 1, 197 * 192}}) {
    for (int bits : {8, 2}) {
      std::vector<Coded> seen;
      for (int threads : {1, 2, 3, 8}) {
        omp_set_num_threads(threads);
        seen.push_back(run(levels().back(), x, layout, bits, true, {seed, 8}, nullptr));
        Coded narrow = seen.front();
        for (float& s : narrow.step) s *= 0.8f;
        seen.push_back(run(levels().back(), x, layout, bits, true, {seed, 8}, &narrow));
      }
      omp_set_num_threads(before);
      for (size_t i = 2; i < seen.size(); ++i) require_same(seen[i], seen[i % 2]);
    }
  }
}

TEST_CASE("the codec refuses what it cannot hold", "[codec]") {
  const Tensor x = random_tensor({4, 6}, DType::f32, 1), one = floats(1);
  const auto quantize = [&](GroupLayout layout, int bits, int64_t bytes) {
    kernels::quantize(x, layout, bits, false, RandomKey{}, one, one, Tensor::zeros({bytes}, DType::u8), Tensor(), Tensor(), Tensor());
  };
  REQUIRE_NOTHROW(quantize({1, 1, 24}, 8, 24));
  REQUIRE_THROWS_AS(quantize({1, 1, 25}, 8, 24), Error);
  REQUIRE_THROWS_AS(quantize({1, 2, 12}, 8, 24), Error);
  REQUIRE_THROWS_AS(quantize({1, 1, 24}, 3, 9), Error);
  REQUIRE_THROWS_AS(quantize({1, 1, 24}, 4, 24), Error);
  REQUIRE_THROWS_AS(quantize({1, 5, 24, true}, 8, 24), Error);
}
