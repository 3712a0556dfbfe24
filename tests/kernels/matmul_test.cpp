// Matrix products against sums in double, over dtypes, transposes, biases and empty extents.
#include "mesa/kernels/matmul.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <tuple>

#include "support/errors.h"
#include "support/kernels.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

std::vector<double> product(const Tensor& a, const Tensor& b, const std::vector<double>& start) {
  const int64_t M = a.dim(0), K = a.dim(1), N = b.dim(1);
  const std::vector<double> x = a.to_vector<double>(), y = b.to_vector<double>();
  std::vector<double> out = start;
  for (int64_t i = 0; i < M; ++i)
    for (int64_t j = 0; j < N; ++j)
      for (int64_t k = 0; k < K; ++k) out[i * N + j] += x[i * K + k] * y[k * N + j];
  return out;
}

}  // namespace

TEST_CASE("matmul: every dtype, transpose, bias and accumulation", "[kernels]") {
  struct Mix {
    DType in, out;
    double tolerance;
  };
  for (const Mix& mix : {Mix{DType::f64, DType::f64, 1e-13}, Mix{DType::f32, DType::f32, 2e-5}, Mix{DType::bf16, DType::f32, 2e-5},
                         Mix{DType::bf16, DType::bf16, 0.01}})
    for (const auto& [M, K, N] :
         {std::tuple<int64_t, int64_t, int64_t>{1, 1, 1}, {7, 33, 5}, {600, 20, 17}, {3, 0, 4}, {0, 3, 4}, {64, 64, 64}})
      for (int variant = 0; variant < 24; ++variant) {
        const bool left = variant & 1, right = variant & 2, biased = variant & 4, accumulate = variant / 8 == 1, adding = variant / 8 == 2;
        CAPTURE(to_string(mix.in), to_string(mix.out), M, K, N, left, right, biased, accumulate, adding);
        const Tensor a = left ? random({K, M}, mix.in, "a").transpose(0, 1) : random({M, K}, mix.in, "a");
        const Tensor b = right ? random({N, K}, mix.in, "b").transpose(0, 1) : random({K, N}, mix.in, "b");
        const bool narrow = test_device() == kCuda && mix.out == DType::bf16 && left;  // the copy that an optimizer keeps
        const DType wide = mix.out == DType::f64 ? DType::f64 : DType::f32;
        const Tensor bias = biased ? random({N}, narrow ? DType::bf16 : wide, "bias") : Tensor();
        const Tensor c = random({M, N}, mix.out, "c"), other = random({M, N}, mix.out, "addend");
        const Tensor addend = accumulate ? c : adding ? other : Tensor();
        std::vector<double> start = addend.defined() ? addend.to_vector<double>() : std::vector<double>(M * N);
        if (biased)
          for (int64_t i = 0; i < M * N; ++i) start[i] += bias.to_vector<double>()[i % N];
        const std::vector<double> want = product(a, b, start);
        Staging at;  // where the test device is a GPU, copies of the operands
        if (test_device() == kCuda)
          kernels::matmul(at(a), at(b), at(c), at(bias), at(addend)), at.bring_back();
        else
          kernels::matmul(a, b, c, bias, addend);
        // A GPU's epilogue takes the bias in the result's type: its rounding is relative to the bias, which may cancel against the rest.
        std::vector<double> terms(want.size(), 0.0);
        const std::vector<double> added = biased ? bias.to_vector<double>() : std::vector<double>();
        for (size_t i = 0; i < terms.size() && biased; ++i) {
          const double b = added[i % N];
          terms[i] = std::fabs(b) + std::fabs(want[i] - b);
        }
        expect(c, want, mix.tolerance, terms);
      }
}

TEST_CASE("matmul: an addend of another form is refused", "[kernels]") {
  const Tensor a = random({2, 3}, DType::f32, "a"), b = random({3, 4}, DType::f32, "b"), c = random({2, 4}, DType::f32, "c");
  for (const Tensor& addend :
       {random({2, 3}, DType::f32, "x"), random({2, 4}, DType::bf16, "x"), random({4, 2}, DType::f32, "x").transpose(0, 1)})
    CHECK_THAT(error_of([&] { kernels::matmul(a, b, c, {}, addend); }), Contains("cannot add") && Contains("[2, 4]"));
}

TEST_CASE("matmul: a bias of another dtype or with gaps is refused", "[kernels]") {
  const Tensor a = random({2, 3}, DType::f32, "a"), b = random({3, 4}, DType::f32, "b"), c = random({2, 4}, DType::f32, "c");
  CHECK_THAT(error_of([&] { kernels::matmul(a, b, c, random({4}, DType::bf16, "bias")); }), Contains("a bias of bf16"));
  CHECK_THAT(error_of([&] { kernels::matmul(a, b, c, random({4, 2}, DType::f32, "bias").select(1, 0)); }), Contains("does not fit"));
  CHECK_THAT(error_of([&] { kernels::matmul(a, b, c, random({3}, DType::f32, "bias")); }), Contains("does not fit"));
}

TEST_CASE("matmul: the weight's gradient and the sums of dy, written or added to what is there", "[kernels]") {
  for (const DType in : {DType::f64, DType::f32, DType::bf16})
    for (const auto& [M, O, I] : {std::tuple<int64_t, int64_t, int64_t>{1, 1, 1}, {33, 7, 5}, {600, 17, 20}, {0, 3, 4}, {64, 64, 32}})
      for (int variant = 0; variant < 8; ++variant) {
        const bool add_w = variant & 1, add_b = variant & 2, wants_b = variant & 4;
        CAPTURE(to_string(in), M, O, I, add_w, add_b, wants_b);
        const DType wide = in == DType::f64 ? DType::f64 : DType::f32;
        const Tensor dy = random({M, O}, in, "dy"), x = random({M, I}, in, "x"), dw = random({O, I}, wide, "dw");
        const Tensor db = wants_b ? random({O}, wide, "db") : Tensor();
        const std::vector<double> y = dy.to_vector<double>(), v = x.to_vector<double>();
        const auto begin = [](const Tensor& t, bool add) { return add ? t.to_vector<double>() : std::vector<double>(t.numel()); };
        std::vector<double> want_w = begin(dw, add_w), terms_w(want_w.size()), want_b, terms_b(O);
        if (wants_b) want_b = begin(db, add_b);
        for (int64_t m = 0; m < M; ++m)
          for (int64_t o = 0; o < O; ++o) {
            const double d = y[m * O + o];
            if (wants_b) want_b[o] += d, terms_b[o] += std::fabs(d);
            for (int64_t i = 0; i < I; ++i) want_w[o * I + i] += d * v[m * I + i], terms_w[o * I + i] += std::fabs(d * v[m * I + i]);
          }
        Staging at;
        if (test_device() == kCuda)
          kernels::matmul_weight_grad(at(dy), at(x), at(dw), add_w, at(db), add_b), at.bring_back();
        else
          kernels::matmul_weight_grad(dy, x, dw, add_w, db, add_b);
        const double tolerance = in == DType::f64 ? 1e-13 : 2e-6;
        expect(dw, want_w, tolerance, terms_w);
        if (wants_b) expect(db, want_b, tolerance, terms_b);
      }
}
