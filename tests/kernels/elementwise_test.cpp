// Pointwise kernels against their formulas in double, on every instruction set this CPU has.
#include "mesa/kernels/elementwise.h"

#include <omp.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>

#include "support/kernels.h"

using namespace mesa;
using namespace mesa::testing;

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kSizes[] = {1, 3, 16, 17, 64, 197, 768, 40001};  // vector tails, and enough work to fork

double tolerance(DType dtype) { return dtype == DType::f64 ? 1e-14 : dtype == DType::f32 ? 5e-7 : 0.004; }

/// y[i] is want(i) up to `slack` roundings to y's dtype, relative to magnitude 1 or more.
template <class F>
void expect(const Tensor& y, const F& want, double slack = 1) {
  const std::vector<double> got = y.to_vector<double>();
  double worst = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double w = want(i), error = std::fabs(got[i] - w) / std::max(1.0, std::fabs(w));
    if (std::isnan(w) || std::isinf(w)) {
      INFO("element " << i << " is " << got[i] << ", not " << w);
      REQUIRE((std::isnan(w) ? std::isnan(got[i]) : got[i] == w));
    } else {
      worst = worse(worst, error);
    }
  }
  CHECK(worst < slack * tolerance(y.dtype()));
}

struct Mix {
  DType a, b, y;
};
constexpr Mix kMixes[] = {{DType::f32, DType::f32, DType::f32},    {DType::f64, DType::f64, DType::f64},
                          {DType::bf16, DType::bf16, DType::bf16}, {DType::f32, DType::bf16, DType::f32},
                          {DType::bf16, DType::f32, DType::bf16},  {DType::f32, DType::f32, DType::bf16},
                          {DType::bf16, DType::bf16, DType::f32}};

double normal_cdf(double x) { return 0.5 * std::erfc(-x * std::sqrt(0.5)); }
double normal_density(double x) { return std::exp(-0.5 * x * x) / std::sqrt(2 * M_PI); }

/// Every size, mix of dtypes and implementation of y = f(a, b).
template <class K, class F>
void check_pair(const K& run, const F& f, double slack = 1) {
  for (const int64_t n : kSizes)
    for (const Mix& mix : kMixes) {
      CAPTURE(n, to_string(mix.a), to_string(mix.b), to_string(mix.y));
      const Tensor a = random({n}, mix.a, "a", 2), b = random({n}, mix.b, "b", 2), y = Tensor::empty({n}, mix.y);
      const std::vector<double> va = a.to_vector<double>(), vb = b.to_vector<double>();
      run(a, b, y);
      expect(
          y, [&](size_t i) { return f(va[i], vb[i]); }, slack);
    }
}
template <class K, class F>
void check_pairs(const K& kernel, const F& f) {
  for (const auto& run : implementations(kernel)) check_pair(run, f);
}
template <class K, class F>
void check_map(const K& run, const F& f) {
  for (const int64_t n : kSizes)
    for (const Mix& mix : kMixes) {
      CAPTURE(n, to_string(mix.a), to_string(mix.y));
      const Tensor x = random({n}, mix.a, "x", 2), y = Tensor::empty({n}, mix.y);
      const std::vector<double> vx = x.to_vector<double>();
      run(x, y);
      expect(y, [&](size_t i) { return f(vx[i]); });
    }
}

}  // namespace

TEST_CASE("pointwise arithmetic", "[kernels]") {
  check_pairs(kernels::add, [](double a, double b) { return a + b; });
  check_pairs(kernels::mul, [](double a, double b) { return a * b; });
  for (const auto& run : implementations(kernels::scale))
    check_map([&](const Tensor& x, const Tensor& y) { run(x, -0.75, y); }, [](double x) { return -0.75 * x; });
  const Tensor y = Tensor::empty({70}, DType::bf16);
  kernels::fill(y, 1.5);
  expect(y, [](size_t) { return 1.5; });
}

TEST_CASE("kernels write in place", "[kernels]") {
  const Tensor x = random({1000}, DType::f32, "x");
  const std::vector<double> before = x.to_vector<double>();
  kernels::add(x, x, x);
  expect(x, [&](size_t i) { return 2 * before[i]; });
  kernels::gelu(x, x);
  expect(x, [&](size_t i) { return 2 * before[i] * normal_cdf(2 * before[i]); });
}

TEST_CASE("copy converts between dtypes and layouts", "[kernels]") {
  for (const DType from : {DType::f32, DType::bf16, DType::f64})
    for (const DType to : {DType::f32, DType::bf16, DType::f64}) {
      CAPTURE(to_string(from), to_string(to));
      const Tensor x = random({2, 5, 3, 4, 33}, from, "x");
      const Tensor heads = x.select(2, 1).transpose(1, 2);  // [2, 4, 5, 33]
      const Tensor y = Tensor::empty({2, 5, 4, 33}, to).transpose(1, 2), z = Tensor::empty({33, 5, 4, 2}, to);
      for (const auto& run : implementations(kernels::copy)) {
        for (const Tensor& target : {Tensor::empty({2, 4, 5, 33}, to), y}) {
          run(heads, target);
          const std::vector<double> want = heads.to_vector<double>();
          expect(target, [&](size_t i) { return want[i]; });
        }
        const Tensor turned = heads.transpose(0, 3).transpose(1, 2);  // [33, 5, 4, 2]
        run(turned, z);
        const std::vector<double> want = turned.to_vector<double>();
        expect(z, [&](size_t i) { return want[i]; });
      }
    }
}

TEST_CASE("copy transposes matrices and repeats broadcast rows", "[kernels]") {
  for (const auto& [m, n] : {std::pair<int64_t, int64_t>{1, 1}, {1, 70}, {70, 1}, {31, 33}, {197, 768}}) {
    const Tensor x = random({m, n}, DType::f32, "x"), y = Tensor::empty({n, m}, DType::f32);
    kernels::copy(x.transpose(0, 1), y);
    const std::vector<float> want = x.transpose(0, 1).to_vector<float>();
    CHECK(y.to_vector<float>() == want);
    const Tensor row = x.as_strided({3, n}, {0, 1}, 0), tall = Tensor::empty({3, n}, DType::f32);
    kernels::copy(row, tall);
    CHECK(tall.to_vector<float>() == row.to_vector<float>());
  }
  kernels::copy(Tensor::empty({0, 4}, DType::f32), Tensor::empty({0, 4}, DType::bf16));
  CHECK_THROWS_AS(kernels::copy(Tensor::empty({2, 3}, DType::f32), Tensor::empty({3, 2}, DType::f32)), Error);
}

TEST_CASE("bf16 stores round to nearest even and keep NaN", "[kernels]") {
  const std::vector<float> values{1.0f, 1.00390625f, 1.01171875f, 3e38f, 3.4e38f, float(kInfinity), float(kNan), -0.0f, 1e-40f};
  for (const auto& run : implementations(kernels::copy)) {
    std::vector<float> many;  // long enough for whole vectors
    for (int i = 0; i < 5; ++i) many.insert(many.end(), values.begin(), values.end());
    const Tensor x = Tensor::from<float>({45}, many), y = Tensor::empty({45}, DType::bf16);
    run(x, y);
    for (size_t i = 0; i < many.size(); ++i) {
      const bf16 got = y.data<bf16>()[i];  // which NaN is each device's own affair
      CHECK((std::isnan(many[i]) ? std::isnan(static_cast<float>(got)) : got.bits == bf16(many[i]).bits));
    }
  }
}

TEST_CASE("rows are added and summed", "[kernels]") {
  for (const auto& [m, n] : {std::pair<int64_t, int64_t>{1, 1}, {3, 17}, {65, 197}, {130, 768}, {500, 10}, {4500, 5}}) {
    const int64_t columns = n;
    for (const Mix& mix : kMixes) {
      CAPTURE(m, n, to_string(mix.a), to_string(mix.b), to_string(mix.y));
      const Tensor a = random({m, n}, mix.a, "a"), b = random({n}, mix.b, "b"), y = Tensor::empty({m, n}, mix.y);
      const std::vector<double> va = a.to_vector<double>(), vb = b.to_vector<double>();
      for (const auto& run : implementations(kernels::add_rows)) {
        run(a, b, y);
        expect(y, [&](size_t i) { return va[i] + vb[i % columns]; });
      }
      std::vector<double> sums(n);
      for (size_t i = 0; i < va.size(); ++i) sums[i % n] += va[i];
      const DType wide = mix.a == DType::f64 ? DType::f64 : DType::f32;
      for (const auto& run : implementations(kernels::sum_rows)) {
        const Tensor db = Tensor::empty({n}, wide);
        run(a, db, false);
        const double slack = wide == DType::f64 ? 1e-12 : 1e-6 * std::sqrt(m);  // as roundings of so many terms add up, where these cancel
        for (int64_t c = 0; c < n; ++c) CHECK(db.to_vector<double>()[c] == Approx(sums[c]).margin(slack));
        run(a, db, true);
        for (int64_t c = 0; c < n; ++c) CHECK(db.to_vector<double>()[c] == Approx(2 * sums[c]).margin(2 * slack));
      }
    }
  }
}

TEST_CASE("rows are scaled, each by a factor of its own", "[kernels]") {
  for (const auto& [m, n] : {std::pair<int64_t, int64_t>{1, 1}, {3, 17}, {65, 192}, {130, 768}, {2, 3000}, {3, 20004}, {66000, 2}}) {
    const int64_t columns = n;
    for (const Mix& mix : kMixes) {
      if (m > 65535 && &mix != kMixes) continue;  // more rows than a grid has rows of blocks: once
      CAPTURE(m, n, to_string(mix.a), to_string(mix.y));
      const Tensor x = random({m, n}, mix.a, "x"), y = Tensor::empty({m, n}, mix.y);
      const Tensor s = random({m}, mix.a == DType::f64 ? DType::f64 : DType::f32, "s");
      const std::vector<double> vx = x.to_vector<double>(), vs = s.to_vector<double>();
      for (const auto& run : implementations(kernels::scale_rows)) {
        run(x, s, y);
        expect(y, [&](size_t i) { return vs[i / columns] * vx[i]; });
      }
    }
  }
  const Tensor x = Tensor::zeros({3, 4}, DType::f32);
  CHECK_THROWS_AS(kernels::scale_rows(x, Tensor::zeros({4}, DType::f32), x), Error);
}

TEST_CASE("relu and gelu and their gradients", "[kernels]") {
  const auto gelu_slope = [](double x) { return normal_cdf(x) + x * normal_density(x); };
  for (const auto& run : implementations(kernels::relu)) check_map(run, [](double x) { return std::max(x, 0.0); });
  for (const auto& run : implementations(kernels::gelu)) check_map(run, [](double x) { return x * normal_cdf(x); });
  const double largest = 10;  // |dy| scales the slope's absolute error where the slope itself is near 0
  const auto without_value = [](const auto& run) {
    return [run](const Tensor& dy, const Tensor& x, const Tensor& dx) { run(dy, x, dx, Tensor()); };
  };
  for (const auto& run : implementations(kernels::gelu_grad))
    check_pair(
        without_value(run), [=](double dy, double x) { return dy * gelu_slope(x); }, largest);
}

TEST_CASE("gelu's gradient rebuilds its value in the same pass", "[kernels]") {
  for (const int64_t n : kSizes)
    for (const DType dtype : {DType::f32, DType::bf16, DType::f64})
      for (const DType type_dy : {dtype, dtype == DType::f64 ? DType::f64 : DType::f32}) {
        CAPTURE(n, to_string(dtype), to_string(type_dy));
        const Tensor x = tensor_of({n}, normal_values(n, "x"), dtype), dy = tensor_of({n}, normal_values(n, "dy"), type_dy);
        for (size_t which = 0; which < implementations(kernels::gelu_grad).size(); ++which) {
          const Tensor dx = empty_like(dy), y = empty_like(x), together = empty_like(dy), again = empty_like(x);
          implementations(kernels::gelu_grad)[which](dy, x, dx, Tensor());
          implementations(kernels::gelu)[which](x, y);
          kernels::copy(dy, together), kernels::fill(again, kNan);
          implementations(kernels::gelu_grad)[which](together, x, together, again);
          const std::vector<double> want = dx.to_vector<double>(), value = y.to_vector<double>();  // up to the order of a sum's terms
          expect(together, [&](size_t i) { return want[i]; });
          expect(again, [&](size_t i) { return value[i]; });
          if (n < 2) continue;  // from an address that is no multiple of a pack
          const auto tail = [n](const Tensor& t) { return t.narrow(0, 1, n - 1); };
          kernels::copy(dy, together), kernels::fill(again, kNan);
          implementations(kernels::gelu_grad)[which](tail(together), tail(x), tail(together), tail(again));
          expect(tail(together), [&](size_t i) { return want[i + 1]; });
          expect(tail(again), [&](size_t i) { return value[i + 1]; });
        }
      }
}

TEST_CASE("relu leaves a bit for each element, which a gradient is masked with", "[kernels]") {
  for (const int64_t n : kSizes)
    for (const DType dtype : {DType::f32, DType::bf16, DType::f64}) {
      CAPTURE(n, to_string(dtype));
      std::vector<double> values = normal_values(n, "x"), slopes = normal_values(n, "dy");
      const double special[] = {0.0, -0.0, kNan, kInfinity, -kInfinity};
      for (int64_t i = 0; i < n && i < 40; i += 8) values[i] = special[i / 8];
      const Tensor x = tensor_of({n}, values, dtype), dy = tensor_of({n}, slopes, dtype), y = Tensor::empty({n}, dtype), dx = empty_like(y);
      const std::vector<double> vx = x.to_vector<double>(), vd = dy.to_vector<double>();
      const Tensor mask = Tensor::empty({(n + 7) / 8}, DType::u8);
      for (size_t which = 0; which < implementations(kernels::relu_mask).size(); ++which) {
        kernels::fill(y, -1), kernels::fill(dx, -1);
        std::fill_n(mask.data<uint8_t>(), mask.numel(), uint8_t{0xa5});
        implementations(kernels::relu_mask)[which](x, y, mask);
        implementations(kernels::apply_mask)[which](dy, mask, dx);
        expect(y, [&](size_t i) { return std::isnan(vx[i]) ? kNan : std::max(vx[i], 0.0); });
        expect(dx, [&](size_t i) { return vx[i] <= 0 ? 0.0 : vd[i]; });
        if (n % 8 != 0) CHECK(mask.data<uint8_t>()[n / 8] >> (n % 8) == 0);
        implementations(kernels::apply_mask)[which](dy, mask, dy);  // in place
        CHECK(dy.to_vector<double>() == dx.to_vector<double>());
        kernels::copy(tensor_of({n}, vd, dtype), dy);
      }
    }
  const Tensor x = Tensor::zeros({9}, DType::f32);
  CHECK_THROWS_WITH(kernels::relu_mask(x, x, Tensor::zeros({1}, DType::u8)), Catch::Contains("a mask of 1 bytes for 9 elements"));
}

TEST_CASE("gelu is accurate over its whole range", "[kernels]") {
  std::vector<float> values;
  for (float x = -14; x < 14; x += 0.00037f) values.push_back(x);
  const int64_t n = static_cast<int64_t>(values.size());
  const Tensor x = Tensor::from<float>({n}, values), y = Tensor::empty({n}, DType::f32), dx = Tensor::empty({n}, DType::f32);
  const Tensor ones = Tensor::empty({n}, DType::f32);
  kernels::fill(ones, 1);
  for (size_t which = 0; which < implementations(kernels::gelu).size(); ++which) {
    implementations(kernels::gelu)[which](x, y);
    implementations(kernels::gelu_grad)[which](ones, x, dx, Tensor());
    double worst = 0, worst_slope = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double v = values[i], want = v * normal_cdf(v);
      // Half a unit in the last place is 6e-8 of the value; the rest is the approximation's own error.
      worst = worse(worst, std::fabs(y.data<float>()[i] - want) / std::max(1.0, std::fabs(want)));
      worst_slope = worse(worst_slope, std::fabs(dx.data<float>()[i] - normal_cdf(v) - v * normal_density(v)));
    }
    // Of a GPU's two instructions, ex2.approx and rcp.approx, 2^-22 and 2^-23 may be wrong (PTX ISA), which here adds up to 0.9e-7 and
    // 3e-7.
    const bool gpu = test_device() == kCuda;
    CHECK(worst < (gpu ? 2e-7 : 1.5e-7));
    CHECK(worst_slope < (gpu ? 5.5e-7 : 4e-7));
  }
}

TEST_CASE("NaN passes through activations and infinities do not become NaN", "[kernels]") {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f64}) {
    const Tensor x = Tensor::empty({4}, dtype), y = Tensor::empty({4}, dtype), ones = Tensor::empty({4}, dtype);
    kernels::copy(Tensor::from<double>({4}, {kNan, kInfinity, -kInfinity, 1e30}), x);
    kernels::fill(ones, 1);
    const std::vector<double> relu{kNan, kInfinity, 0, x.to_vector<double>()[3]}, slope{kNan, 1, 0, 1};
    for (const auto& run : implementations(kernels::gelu)) {
      run(x, y);
      expect(y, [&](size_t i) { return relu[i]; });
    }
    for (const auto& run : implementations(kernels::relu)) {
      run(x, y);
      expect(y, [&](size_t i) { return relu[i]; });
    }
    for (const auto& run : implementations(kernels::gelu_grad)) {
      run(ones, x, y, Tensor());
      expect(y, [&](size_t i) { return slope[i]; });
    }
    for (const auto& run : implementations(kernels::gelu_grad)) {
      run(x, ones, y, Tensor());
      CHECK(std::isnan(y.to_vector<double>()[0]));
    }
  }
}

TEST_CASE("sum_squares, count_nonfinite and first_nonfinite", "[kernels]") {
  for (const int64_t n : kSizes)
    for (const DType dtype : {DType::f32, DType::bf16, DType::f64}) {
      const Tensor x = random({n}, dtype, "x");
      double want = 0;
      for (const double v : x.to_vector<double>()) want += v * v;
      const Tensor got = Tensor::empty({1}, DType::f64), counts = Tensor::from<int64_t>({2}, {5, 7});
      for (const auto& run : implementations(kernels::sum_squares)) {
        run({x, x, Tensor::empty({0}, dtype)}, got);
        CHECK(got.data<double>()[0] == Approx(2 * want).epsilon(1e-12));
      }
      for (const auto& run : implementations(kernels::count_nonfinite)) run(x, counts);
      CHECK(counts.to_vector<int64_t>() == std::vector<int64_t>{5, 7});
      int64_t at = 5;
      for (const auto& run : implementations(kernels::first_nonfinite)) {
        run(x, &at);
        CHECK(at == -1);
      }
      for (const double bad : {kNan, kInfinity, -kInfinity}) {
        kernels::fill(x.narrow(0, n / 2, (n + 1) / 2), bad);
        for (const auto& run : implementations(kernels::first_nonfinite)) {
          run(x, &at);
          CHECK(at == n / 2);
        }
        for (const auto& run : implementations(kernels::count_nonfinite)) {
          clear(counts);
          run(x, counts);
          CHECK(counts.to_vector<int64_t>() == std::vector<int64_t>{0, (n + 1) / 2});
        }
      }
    }
}

TEST_CASE("sums do not depend on the number of threads", "[kernels]") {
  const int threads = omp_get_max_threads();
  const Tensor x = random({1001, 67}, DType::f32, "x");
  std::vector<std::vector<float>> sums;
  std::vector<double> squares;
  for (const int count : {1, 2, 3}) {
    omp_set_num_threads(count);
    const Tensor db = Tensor::empty({67}, DType::f32);
    kernels::sum_rows(x, db, false);
    sums.push_back(db.to_vector<float>());
    const Tensor square = Tensor::empty({1}, DType::f64);
    kernels::sum_squares(std::vector{x}, square);
    squares.push_back(square.data<double>()[0]);
  }
  omp_set_num_threads(threads);
  CHECK((sums[0] == sums[1] && sums[0] == sums[2]));
  CHECK((squares[0] == squares[1] && squares[0] == squares[2]));
}

TEST_CASE("pointwise kernels refuse what they cannot do", "[kernels]") {
  const Tensor x = Tensor::zeros({4, 6}, DType::f32);
  CHECK_THROWS_AS(kernels::add(x, Tensor::zeros({4, 5}, DType::f32), x), Error);
  CHECK_THROWS_AS(kernels::add(x, Tensor::zeros({4, 6}, DType::f64), x), Error);
  CHECK_THROWS_AS(kernels::gelu(x.transpose(0, 1), x), Error);
  CHECK_THROWS_AS(kernels::add_rows(x, Tensor::zeros({5}, DType::f32), x), Error);
  CHECK_THROWS_AS(kernels::dropout(x, x, 1.5, RandomKey{}), Error);
}
