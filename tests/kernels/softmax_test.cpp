// Softmax over rows and the softmax of attention against double arithmetic, on every instruction set this CPU has.
#include "mesa/kernels/norm.h"

#include <omp.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>

#include "mesa/kernels/elementwise.h"
#include "support/kernels.h"

using namespace mesa;
using namespace mesa::testing;

namespace {

double tolerance(DType dtype) { return dtype == DType::f64 ? 1e-13 : dtype == DType::f32 ? 2e-6 : 0.008; }

constexpr int64_t kWidths[] = {1, 3, 16, 17, 64, 65, 197, 768};

struct Reference {
  std::vector<double> p, lse;
};
Reference softmax_of(const std::vector<double>& s, int64_t width, double scale) {
  Reference out{s, {}};
  for (size_t row = 0; row < s.size(); row += width) {
    double top = scale * s[row], sum = 0;
    for (int64_t j = 0; j < width; ++j) top = std::max(top, scale * s[row + j]);
    for (int64_t j = 0; j < width; ++j) sum += std::exp(scale * s[row + j] - top);
    out.lse.push_back(top + std::log(sum));
    for (int64_t j = 0; j < width; ++j) out.p[row + j] = std::exp(scale * s[row + j] - out.lse.back());
  }
  return out;
}
/// scale p (dp - sum p dp) for rows of `width`; `terms`: the same with every term's size, for the difference may cancel.
std::vector<double> grad_of(const std::vector<double>& dp, const std::vector<double>& p, int64_t width, double scale,
                            std::vector<double>* terms = nullptr) {
  std::vector<double> out(p.size());
  if (terms) terms->resize(p.size());
  for (size_t row = 0; row < p.size(); row += width) {
    double sum = 0, sizes = 0;
    for (int64_t j = 0; j < width; ++j) sum += p[row + j] * dp[row + j], sizes += std::fabs(p[row + j] * dp[row + j]);
    for (int64_t j = 0; j < width; ++j) {
      out[row + j] = scale * p[row + j] * (dp[row + j] - sum);
      if (terms) (*terms)[row + j] = scale * p[row + j] * (std::fabs(dp[row + j]) + sizes);
    }
  }
  return out;
}

}  // namespace

TEST_CASE("softmax and its gradient", "[kernels]") {
  for (const int64_t width : kWidths)
    for (const auto& [from, to] : {std::pair{DType::f32, DType::f32}, {DType::f64, DType::f64}, {DType::bf16, DType::bf16}}) {
      CAPTURE(width, to_string(from));
      const Tensor x = random({37, width}, from, "x", 4), y = Tensor::empty({37, width}, to), dx = empty_like(y);
      const Tensor dy = random({37, width}, from, "dy");
      for (const auto& run : implementations(kernels::softmax)) {
        run(x, y);
        expect(y, softmax_of(x.to_vector<double>(), width, 1).p, tolerance(to));
      }
      for (const auto& run : implementations(kernels::softmax_grad)) {
        run(dy, y, dx);
        std::vector<double> terms;
        const std::vector<double> want = grad_of(dy.to_vector<double>(), y.to_vector<double>(), width, 1, &terms);
        expect(dx, want, tolerance(to), terms);
      }
    }
}

TEST_CASE("attention_softmax, its saved log-sum-exp and its gradient", "[kernels]") {
  const double scale = 0.125;
  for (const int64_t width : kWidths)
    for (const auto& [from, to] : {std::pair{DType::f32, DType::f32}, {DType::f64, DType::f64}, {DType::f32, DType::bf16}}) {
      CAPTURE(width, to_string(from), to_string(to));
      const Tensor s = random({6, 11, width}, from, "s", 20), p = Tensor::empty({6, 11, width}, to), again = empty_like(p);
      const Tensor lse = Tensor::empty({6, 11}, from);
      const Reference want = softmax_of(s.to_vector<double>(), width, scale);
      for (const auto& run : implementations(kernels::attention_softmax)) {
        run(s, scale, p, lse);
        expect(p, want.p, tolerance(to));
        expect(lse, want.lse, tolerance(from));
      }
      for (const auto& run : implementations(kernels::attention_probabilities)) {
        run(s, scale, lse, again);
        expect(again, want.p, tolerance(to));
      }
      const Tensor exact_p = Tensor::from<double>(s.shape(), want.p), q = Tensor::empty(s.shape(), from);
      kernels::copy(exact_p, q);
      const Tensor dp = random({6, 11, width}, from, "dp"), delta = Tensor::empty({6, 11}, from);
      const std::vector<double> dp_values = dp.to_vector<double>(), q_values = q.to_vector<double>();
      const std::vector<double> ds = grad_of(dp_values, q_values, width, scale);
      std::vector<double> sums(66);
      for (size_t i = 0; i < ds.size(); ++i) sums[i / width] += dp_values[i] * q_values[i];
      kernels::copy(Tensor::from<double>({6, 11}, sums), delta);
      for (const auto& run : implementations(kernels::attention_softmax_grad)) {
        run(dp, q, Tensor(), scale, again);
        expect(again, ds, tolerance(to));
        run(dp, q, delta, scale, again);
        expect(again, ds, tolerance(to));
      }
    }
}

TEST_CASE("attention_softmax works in place and on strided rows", "[kernels]") {
  const Tensor s = random({50, 100}, DType::f32, "s", 8), lse = Tensor::empty({50}, DType::f32);
  const Tensor part = s.narrow(1, 10, 83);
  const Reference want = softmax_of(part.to_vector<double>(), 83, 0.5);
  const std::vector<float> before = s.to_vector<float>();
  kernels::attention_softmax(part, 0.5, part, lse);
  expect(part, want.p, 2e-6);
  for (int64_t i = 0; i < 5000; ++i)
    if (i % 100 < 10 || i % 100 >= 93) REQUIRE(s.data<float>()[i] == before[i]);
}

TEST_CASE("softmax survives large and infinite scores and lets NaN through", "[kernels]") {
  const float infinity = std::numeric_limits<float>::infinity();
  const int64_t width = 21;
  for (const auto& run : implementations(kernels::attention_softmax)) {
    const Tensor s = Tensor::zeros({4, width}, DType::f32), lse = Tensor::empty({4}, DType::f32);
    float* x = s.data<float>();
    for (int64_t j = 0; j < width; ++j) x[j] = 1e4f * static_cast<float>(j), x[width + j] = j == 3 ? 2.0f : -infinity;
    x[2 * width + 20] = std::numeric_limits<float>::quiet_NaN();
    x[3 * width + 4] = infinity;
    run(s, 1.0, s, lse);
    for (int64_t j = 0; j < width; ++j) {
      CHECK(x[j] == (j == width - 1 ? 1.0f : 0.0f));
      CHECK(x[width + j] == (j == 3 ? 1.0f : 0.0f));
      CHECK(std::isnan(x[2 * width + j]));
    }
    CHECK(lse.data<float>()[0] == 1e4f * 20);
    CHECK(lse.data<float>()[1] == 2.0f);
    CHECK(std::isnan(lse.data<float>()[2]));
    CHECK(std::isnan(x[3 * width + 4]));
  }
}

TEST_CASE("attention_delta is the dot product of each head", "[kernels]") {
  for (const auto& [dtype, wide] : {std::pair{DType::f32, DType::f32}, {DType::f64, DType::f64}, {DType::bf16, DType::f32}}) {
    const int64_t batch = 2, tokens = 17, heads = 3, head = 20, width = heads * head;
    const Tensor o = random({batch, tokens, width}, dtype, "o"), g = random({batch, tokens, width}, dtype, "g");
    const std::vector<double> vo = o.to_vector<double>(), vg = g.to_vector<double>();
    std::vector<double> want(batch * heads * tokens);
    for (int64_t i = 0; i < o.numel(); ++i) {
      const int64_t b = i / width / tokens, n = i / width % tokens, h = i % width / head;
      want[(b * heads + h) * tokens + n] += vo[i] * vg[i];
    }
    const Tensor delta = Tensor::empty({batch, heads, tokens}, wide);
    for (const auto& run : implementations(kernels::attention_delta)) {
      run(g, o, delta);
      expect(delta, want, tolerance(wide));
    }
  }
}
