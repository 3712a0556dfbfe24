// Dropout and drop path: what the stream of random numbers says is kept, and all else is as it was.
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>

#include "mesa/kernels/elementwise.h"
#include "support/errors.h"
#include "support/kernels.h"

using namespace mesa;
using namespace mesa::testing;

namespace {

double tolerance(DType dtype) { return dtype == DType::f64 ? 1e-14 : dtype == DType::f32 ? 5e-7 : 0.004; }

template <class F>
std::vector<double> elements(int64_t n, const F& f) {
  std::vector<double> out;
  for (int64_t i = 0; i < n; ++i) out.push_back(f(static_cast<size_t>(i)));
  return out;
}

}  // namespace

TEST_CASE("dropout keeps what the stream says", "[kernels]") {
  const RandomKey key = RandomKey::of(Catch::rngSeed(), "dropout", 7);
  for (const int64_t n : {1, 3, 16, 17, 64, 197, 768, 40001})
    for (const auto& [from, to] : {std::pair{DType::f32, DType::f32},
                                   {DType::f64, DType::f64},
                                   {DType::bf16, DType::bf16},
                                   {DType::f32, DType::bf16},
                                   {DType::bf16, DType::f32}})
      for (const auto& run : implementations(kernels::dropout)) {
        CAPTURE(n, to_string(from), to_string(to));
        const Tensor x = random({n}, from, "x"), y = Tensor::empty({n}, to);
        const std::vector<double> vx = x.to_vector<double>();
        run(x, y, 0.3, key);
        expect(y, elements(n, [&](size_t i) { return uniform(random_word(key, i)) >= 0.3 ? vx[i] / 0.7 : 0.0; }), tolerance(to));
      }
}

TEST_CASE("dropout's statistics", "[kernels]") {
  const int64_t n = 200000;
  const Tensor x = Tensor::empty({n}, DType::f32), y = Tensor::empty({n}, DType::f32), again = Tensor::empty({n}, DType::f32);
  kernels::fill(x, 1);
  for (const double p : {0.0, 0.1, 0.5, 0.9, 1.0}) {
    const RandomKey key = RandomKey::of(Catch::rngSeed(), "statistics", 1);
    kernels::dropout(x, y, p, key);
    double kept = 0;
    for (int64_t i = 0; i < n; ++i) kept += y.data<float>()[i] != 0;
    CAPTURE(p, Catch::rngSeed());
    CHECK(std::fabs(kept - (1 - p) * n) <= 5 * std::sqrt(p * (1 - p) * n));
    kernels::dropout(x, again, p, key);
    CHECK(again.to_vector<float>() == y.to_vector<float>());
    kernels::dropout(x, again, p, RandomKey{key.key, key.step + 1});
    CHECK((again.to_vector<float>() == y.to_vector<float>()) == (p == 0 || p == 1));
  }
}

TEST_CASE("add_drop_path decides once for each sample of the branch", "[kernels]") {
  RandomKey key = RandomKey::of(Catch::rngSeed(), "path", 3);
  key.first = 5;
  const auto factor = [&](size_t b) { return uniform(random_word(key, b)) >= 0.4 ? 1 / 0.6 : 0.0; };
  const auto check = [&](const Shape& shape, DType type_x, DType type_b) {
    CAPTURE(to_string(type_x), to_string(type_b), shape[0]);
    for (const auto& run : implementations(kernels::add_drop_path)) {
      const Tensor x = random(shape, type_x, "x"), branch = random(shape, type_b, "branch"), y = empty_like(x);
      const Tensor factors = Tensor::empty({shape[0]}, type_x == DType::f64 ? DType::f64 : DType::f32);
      const std::vector<double> vx = x.to_vector<double>(), vb = branch.to_vector<double>();
      const auto sample = static_cast<size_t>(x.numel() / shape[0]);
      const std::vector<double> want = elements(x.numel(), [&](size_t i) { return vx[i] + factor(i / sample) * vb[i]; });
      kernels::fill(factors, std::nan(""));
      run(x, branch, 0.4, key, y, factors);
      expect(y, want, tolerance(type_x));
      expect(factors, elements(shape[0], factor), tolerance(factors.dtype()));
      run(x, branch, 1, key, y, factors);
      REQUIRE(y.to_vector<double>() == vx);
      if (type_x == type_b) {
        kernels::copy(branch, y);
        run(x, y, 0.4, key, y, factors);
        expect(y, want, tolerance(type_x));
      }
      run(x, branch, 0.4, key, x, factors);
      expect(x, want, tolerance(type_x));
    }
  };
  for (const Shape& shape : {Shape{29, 17, 41}, Shape{7, 96, 32}, Shape{3, 40, 260}})  // whole packs and not
    for (const auto& [x, branch] :
         {std::pair{DType::f32, DType::f32}, {DType::f32, DType::bf16}, {DType::bf16, DType::bf16}, {DType::f64, DType::f64}})
      check(shape, x, branch);
  check({66000}, DType::f32, DType::f32);  // more samples than a grid has rows of blocks
}

TEST_CASE("add_drop_path: a dropped sample that is not finite stays so", "[kernels]") {
  const RandomKey key = RandomKey::of(Catch::rngSeed(), "path", 3);
  const Tensor x = Tensor::zeros({64, 4}, DType::f32), branch = Tensor::empty({64, 4}, DType::f32),
               factors = Tensor::empty({64}, DType::f32);
  kernels::fill(branch, std::numeric_limits<double>::infinity());
  for (const auto& run : implementations(kernels::add_drop_path)) {
    const Tensor y = empty_like(x);
    run(x, branch, 0.5, key, y, factors);
    for (int i = 0; i < 256; ++i) CHECK(std::isnan(y.data<float>()[i]) == (factors.data<float>()[i / 4] == 0));
  }
}

TEST_CASE("add_drop_path says what does not fit", "[kernels]") {
  const Tensor x = Tensor::zeros({4, 3}, DType::f32), three = Tensor::zeros({3}, DType::f32), four = Tensor::zeros({4}, DType::f32);
  const auto refusal = [&](const Tensor& branch, double p, const Tensor& y, const Tensor& factors) {
    return error_of([&] { kernels::add_drop_path(x, branch, p, RandomKey{}, y, factors); });
  };
  CHECK_THAT(refusal(x, 0.5, x, three), Catch::Contains("3 factors for 4 samples"));
  CHECK_THAT(refusal(three, 0.5, x, four), Catch::Contains("branch: tensors of shapes [4, 3] and [3]"));
  CHECK_THAT(refusal(x, 0.5, Tensor::zeros({4, 3}, DType::bf16), four), Catch::Contains("adds to fp32 in bf16"));
  CHECK_THAT(refusal(x, 1.5, x, four), Catch::Contains("1.5 is not in [0, 1]"));
  CHECK_THAT(refusal(x, 0.5, x, Tensor::zeros({4}, DType::f64)), Catch::Contains("factors in fp64, not in fp32"));
  const Tensor scalar = Tensor::zeros({}, DType::f32);
  CHECK_THROWS_WITH(kernels::add_drop_path(scalar, scalar, 0.5, RandomKey{}, scalar, four), Catch::Contains("needs an axis of samples"));
}
