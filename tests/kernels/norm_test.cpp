// Layer normalization against its definition in double, on every instruction set this CPU has.
#include "mesa/kernels/norm.h"

#include <omp.h>

#include <catch2/catch.hpp>
#include <cmath>
#include <limits>

#include "mesa/kernels/elementwise.h"
#include "support/kernels.h"

using namespace mesa;
using namespace mesa::testing;

namespace {

double tolerance(DType dtype) { return dtype == DType::f64 ? 1e-13 : dtype == DType::f32 ? 2e-6 : 0.008; }

DType wide(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

struct Case {
  int64_t rows, width;
};
constexpr Case kCases[] = {{1, 1}, {2, 3}, {5, 17}, {66, 64}, {33, 197}, {130, 768}, {5, 1280}};

struct Reference {
  std::vector<double> y, xhat, rstd;
  std::vector<double> terms;  ///< |gamma xhat| + |beta|: what y is a sum of, and so what its rounding is relative to
};
Reference normalize(const std::vector<double>& x, int64_t width, const std::vector<double>& gamma, const std::vector<double>& beta,
                    double eps) {
  Reference out{x, x, {}, x};
  for (size_t row = 0; row < x.size(); row += width) {
    double mean = 0, variance = 0;
    for (int64_t c = 0; c < width; ++c) mean += x[row + c] / width;
    for (int64_t c = 0; c < width; ++c) variance += (x[row + c] - mean) * (x[row + c] - mean) / width;
    out.rstd.push_back(1 / std::sqrt(variance + eps));
    for (int64_t c = 0; c < width; ++c) {
      out.xhat[row + c] = (x[row + c] - mean) * out.rstd.back();
      out.y[row + c] = gamma[c] * out.xhat[row + c] + beta[c];
      out.terms[row + c] = std::fabs(gamma[c] * out.xhat[row + c]) + std::fabs(beta[c]);
    }
  }
  return out;
}

}  // namespace

TEST_CASE("layer_norm follows its definition", "[kernels]") {
  const std::pair<DType, DType> mixes[] = {
      {DType::f32, DType::f32}, {DType::f64, DType::f64}, {DType::bf16, DType::bf16}, {DType::f32, DType::bf16}};
  for (const auto& [rows, width] : kCases)
    for (const auto& [from, to] : mixes) {
      CAPTURE(rows, width, to_string(from), to_string(to));
      std::vector<double> values = normal_values(rows * width, "x");
      for (size_t i = 0; i < values.size(); ++i)  // few elements in a row stand apart: alike ones would have no variance to divide by
        values[i] = width > 3 ? 3 * values[i] : values[i] + (i % width % 2 == 0 ? 4 : -4);
      const Tensor x = tensor_of({rows, width}, values, from), y = Tensor::empty({rows, width}, to), xhat = empty_like(y);
      const Tensor gamma = random({width}, wide(from), "gamma"), beta = random({width}, wide(from), "beta");
      const Tensor rstd = Tensor::empty({rows}, wide(from));
      const Reference want = normalize(x.to_vector<double>(), width, gamma.to_vector<double>(), beta.to_vector<double>(), 1e-3);
      for (const auto& run : implementations(kernels::layer_norm)) {
        run(x, gamma, beta, 1e-3, y, xhat, rstd);
        expect(y, want.y, tolerance(to), want.terms);
        expect(xhat, want.xhat, tolerance(to));
        expect(rstd, want.rstd, tolerance(wide(from)));
        kernels::fill(y, 0);
        run(x, gamma, beta, 1e-3, y, Tensor(), Tensor());
        expect(y, want.y, tolerance(to), want.terms);
      }
    }
}

TEST_CASE("layer_norm reads strided rows and keeps far-off means exact", "[kernels]") {
  const Tensor wide_x = random({40, 100}, DType::f32, "x");
  const Tensor x = wide_x.narrow(1, 20, 64), y = Tensor::empty({40, 64}, DType::f32);
  const Tensor gamma = Tensor::empty({64}, DType::f32), beta = Tensor::zeros({64}, DType::f32);
  kernels::fill(gamma, 1);
  const std::vector<double> ones(64, 1.0), zeros(64, 0.0);
  kernels::layer_norm(x, gamma, beta, 1e-6, y, Tensor(), Tensor());
  expect(y, normalize(x.to_vector<double>(), 64, ones, zeros, 1e-6).y, 2e-6);
  const Tensor far = Tensor::empty({40, 64}, DType::f32);  // the mean is 1000 deviations away: one-pass variances fail here
  std::vector<double> shifted = x.to_vector<double>();
  for (double& v : shifted) v = static_cast<float>(v + 1000);
  kernels::copy(Tensor::from<double>({40, 64}, shifted), far);
  kernels::layer_norm(far, gamma, beta, 1e-6, y, Tensor(), Tensor());
  expect(y, normalize(shifted, 64, ones, zeros, 1e-6).y, 64 * 1000 * 0x1p-24);  // as the sum of a row is rounded
}

TEST_CASE("layer_norm's variance does not lose digits in long rows", "[kernels]") {
  const int64_t width = 4096;  // one chain of so many equal terms is off by 1e-5
  std::vector<double> values(width);
  for (int64_t c = 0; c < width; ++c) values[c] = c % 2 ? 1.1f : -1.1f;
  const Tensor x = tensor_of({1, width}, values, DType::f32), y = empty_like(x), rstd = Tensor::empty({1}, DType::f32);
  const Tensor gamma = tensor_of({width}, std::vector<double>(width, 1), DType::f32), beta = Tensor::zeros({width}, DType::f32);
  for (const auto& run : implementations(kernels::layer_norm)) {
    run(x, gamma, beta, 0, y, Tensor(), rstd);
    CHECK(std::fabs(rstd.data<float>()[0] * 1.1f - 1) <= 3e-6);
  }
}

TEST_CASE("affine repeats layer_norm's output bit for bit", "[kernels]") {
  for (const DType dtype : {DType::f32, DType::f64})
    for (const auto& [rows, width] : kCases) {
      const Tensor x = random({rows, width}, dtype, "x"), y = empty_like(x), xhat = empty_like(x), again = empty_like(x);
      const Tensor gamma = random({width}, dtype, "gamma"), beta = random({width}, dtype, "beta");
      const auto norms = implementations(kernels::layer_norm);
      const auto affines = implementations(kernels::affine);
      for (size_t i = 0; i < norms.size(); ++i) {
        norms[i](x, gamma, beta, 1e-6, y, xhat, Tensor());
        affines[i](xhat, gamma, beta, again);
        CHECK(again.to_vector<double>() == y.to_vector<double>());
      }
    }
}

using kernels::LayerNormGrads;

TEST_CASE("layer_norm_grad follows its formula", "[kernels]") {
  struct Mix {
    DType dy, xhat, dx;
  };
  const Mix mixes[] = {{DType::f32, DType::f32, DType::f32},    {DType::f64, DType::f64, DType::f64},
                       {DType::bf16, DType::bf16, DType::bf16}, {DType::bf16, DType::bf16, DType::f32},
                       {DType::bf16, DType::f32, DType::f32},   {DType::f32, DType::bf16, DType::f32}};
  for (const auto& [rows, width] : kCases)
    for (const Mix& mix : mixes) {
      CAPTURE(rows, width, to_string(mix.dy), to_string(mix.xhat), to_string(mix.dx));
      const DType exact = wide(mix.dx);
      const Tensor dy = random({rows, width}, mix.dy, "dy"), xhat = random({rows, width}, mix.xhat, "xhat");
      const Tensor gamma = random({width}, exact, "gamma"), rstd = random({rows}, exact, "rstd");
      const std::vector<double> g = dy.to_vector<double>(), h = xhat.to_vector<double>(), w = gamma.to_vector<double>();
      const std::vector<double> scale = rstd.to_vector<double>();
      std::vector<double> dx(g.size()), dgamma(width), dbeta(width);
      for (int64_t row = 0; row < rows; ++row) {
        double mean = 0, mean_h = 0;
        for (int64_t c = 0, i = row * width; c < width; ++c, ++i) mean += w[c] * g[i] / width, mean_h += w[c] * g[i] * h[i] / width;
        for (int64_t c = 0, i = row * width; c < width; ++c, ++i) {
          dx[i] = scale[row] * (w[c] * g[i] - mean - h[i] * mean_h);
          dgamma[c] += g[i] * h[i];
          dbeta[c] += g[i];
        }
      }
      std::vector<double> twice_gamma = dgamma;
      for (double& v : twice_gamma) v *= 2;
      const Tensor residual = random({rows, width}, mix.dx, "residual");
      std::vector<double> sum = residual.to_vector<double>(), sum_terms(sum.size());
      for (size_t i = 0; i < sum.size(); ++i) sum_terms[i] = std::fabs(sum[i]) + std::fabs(dx[i]), sum[i] += dx[i];
      const Tensor beta = random({width}, exact, "beta"), again = empty_like(xhat);
      for (size_t which = 0; which < implementations(kernels::layer_norm_grad).size(); ++which) {
        const auto run = implementations(kernels::layer_norm_grad)[which];
        const Tensor out = Tensor::empty({rows, width}, mix.dx), out_gamma = empty_like(gamma), out_beta = empty_like(gamma);
        run(dy, xhat, rstd, gamma, beta, {.dx = out, .dgamma = out_gamma, .dbeta = out_beta});
        expect(out, dx, tolerance(mix.dx));
        expect(out_gamma, dgamma, 10 * tolerance(exact));
        expect(out_beta, dbeta, 10 * tolerance(exact));
        run(dy, xhat, rstd, gamma, beta, {.dx = out, .dgamma = out_gamma, .add_gamma = true});
        expect(out_gamma, twice_gamma, 10 * tolerance(exact));
        kernels::fill(out, 0);
        run(dy, xhat, rstd, gamma, beta, {.dx = out});
        expect(out, dx, tolerance(mix.dx));
        // Added to what is there, copied in bf16, and y beside it.
        const Tensor copy = Tensor::empty({rows, width}, DType::bf16), rounded = empty_like(copy), y = empty_like(xhat);
        kernels::fill(copy, std::nan("")), kernels::fill(y, std::nan("")), kernels::copy(residual, out);
        run(dy, xhat, rstd, gamma, beta, {.dx = out, .add_x = true, .dx_copy = copy, .y = y});
        expect(out, sum, tolerance(mix.dx), sum_terms);
        kernels::copy(out, rounded);
        implementations(kernels::affine)[which](xhat, gamma, beta, again);
        REQUIRE(copy.to_vector<float>() == rounded.to_vector<float>());
        REQUIRE(y.to_vector<double>() == again.to_vector<double>());
        // The copy's samples, of several rows where some number divides all, times factors.
        const int64_t samples = rows % 13 == 0 ? rows / 13 : rows % 11 == 0 ? rows / 11 : rows % 5 == 0 ? rows / 5 : rows;
        const Tensor factors = random({samples}, exact, "factors"), plain = empty_like(out);
        kernels::fill(factors.narrow(0, 0, 1), 0);
        kernels::copy(residual, plain);
        run(dy, xhat, rstd, gamma, beta, {.dx = plain, .add_x = true, .dx_copy = copy, .copy_factors = factors});
        REQUIRE(plain.to_vector<double>() == out.to_vector<double>());
        kernels::scale_rows(plain.reshape({samples, rows / samples * width}), factors, plain.reshape({samples, rows / samples * width}));
        kernels::copy(plain, rounded);
        if (mix.dx == DType::bf16)  // where dx itself is rounded before or after
          expect(copy, plain.to_vector<double>(), 2 * tolerance(DType::bf16));
        else
          REQUIRE(copy.to_vector<float>() == rounded.to_vector<float>());
        if (mix.dy != mix.xhat) continue;
        const Tensor over = empty_like(dy);
        kernels::copy(dy, over), kernels::copy(residual, out);
        run(over, xhat, rstd, gamma, beta, {.dx = out, .add_x = true, .y = over, .dgamma = out_gamma, .dbeta = out_beta});
        expect(out, sum, tolerance(mix.dx), sum_terms);
        expect(out_gamma, dgamma, 10 * tolerance(exact));
        expect(out_beta, dbeta, 10 * tolerance(exact));
        REQUIRE(over.to_vector<double>() == again.to_vector<double>());
      }
    }
}

TEST_CASE("layer_norm's gradients do not depend on the number of threads", "[kernels]") {
  const int threads = omp_get_max_threads();
  const Tensor dy = random({1001, 65}, DType::f32, "dy"), xhat = random({1001, 65}, DType::f32, "xhat");
  const Tensor gamma = random({65}, DType::f32, "gamma"), rstd = random({1001}, DType::f32, "rstd");
  std::vector<std::vector<float>> results;
  for (const int count : {1, 2, 3}) {
    omp_set_num_threads(count);
    const Tensor dx = empty_like(dy), dgamma = empty_like(gamma), dbeta = empty_like(gamma);
    kernels::layer_norm_grad(dy, xhat, rstd, gamma, Tensor(), LayerNormGrads{.dx = dx, .dgamma = dgamma, .dbeta = dbeta});
    results.push_back(dx.to_vector<float>());
    for (const Tensor& t : {dgamma, dbeta})
      for (const float v : t.to_vector<float>()) results.back().push_back(v);
  }
  omp_set_num_threads(threads);
  CHECK((results[0] == results[1] && results[0] == results[2]));
}

TEST_CASE("NaN and infinity reach layer_norm's output", "[kernels]") {
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    const Tensor x = random({3, 40}, DType::f32, "x"), y = empty_like(x);
    const Tensor gamma = random({40}, DType::f32, "gamma"), beta = random({40}, DType::f32, "beta");
    x.data<float>()[40 + 7] = static_cast<float>(bad);
    for (const auto& run : implementations(kernels::layer_norm)) {
      run(x, gamma, beta, 1e-6, y, Tensor(), Tensor());
      for (int i = 0; i < 120; ++i) CHECK(std::isnan(y.data<float>()[i]) == (i / 40 == 1));
    }
  }
}

TEST_CASE("layer_norm refuses parameters of the wrong size", "[kernels]") {
  const Tensor x = Tensor::zeros({2, 6}, DType::f32), five = Tensor::zeros({5}, DType::f32), six = Tensor::zeros({6}, DType::f32);
  CHECK_THROWS_WITH(kernels::layer_norm(x, five, six, 1e-6, x, Tensor(), Tensor()),
                    Catch::Contains("gamma has 5 elements but x ends in 6"));
  CHECK_THROWS_AS(kernels::affine(x, six, five, x), Error);
  const Tensor rstd = Tensor::zeros({2}, DType::f32), copy = Tensor::zeros({2, 6}, DType::bf16);
  CHECK_THROWS_WITH(kernels::layer_norm_grad(x, x, rstd, six, five, LayerNormGrads{.dx = x, .y = x}),
                    Catch::Contains("beta has 5 elements"));
  CHECK_THROWS_WITH(kernels::layer_norm_grad(x, x, rstd, six, six, LayerNormGrads{.dx = x, .y = copy}),
                    Catch::Contains("rebuilds y in fp32, not in bf16"));
  CHECK_THROWS_WITH(kernels::layer_norm_grad(x, x, rstd, six, six, LayerNormGrads{.dx = x, .dx_copy = x}),
                    Catch::Contains("in bf16, not in fp32"));
  CHECK_THROWS_WITH(kernels::layer_norm_grad(x, x, rstd, six, six, LayerNormGrads{.dx = x, .dx_copy = copy, .copy_factors = five}),
                    Catch::Contains("5 factors for 2 rows"));
  CHECK_THROWS_WITH(kernels::layer_norm_grad(x, x, rstd, six, six,
                                             LayerNormGrads{.dx = x, .dx_copy = copy, .copy_factors = Tensor::zeros({2}, DType::f64)}),
                    Catch::Contains("factors of the copy in fp64"));
  CHECK_THROWS_WITH(kernels::layer_norm_grad(x, x, rstd, six, six, LayerNormGrads{.dx = x, .dx_sums = Tensor::zeros({2, 6}, DType::f32)}),
                    Catch::Contains("sums of dx in [2, 6] fp32, not [1, 6] fp32"));
  CHECK_THROWS_WITH(kernels::layer_norm_grad(x, x, rstd, six, six, LayerNormGrads{.dx = x, .dx_sums = Tensor::zeros({1, 6}, DType::f32)}),
                    Catch::Contains("on a GPU alone"));
}
