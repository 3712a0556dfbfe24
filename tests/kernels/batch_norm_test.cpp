// Batch normalization against its formulas in double, on every instruction set this CPU has.
#include "mesa/kernels/batch_norm.h"

#include <omp.h>

#include <algorithm>

#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/norm.h"
#include "support/kernels.h"

using namespace mesa;
using namespace mesa::testing;

namespace {

using Numbers = std::vector<double>;

struct Size {
  int64_t rows, width;
};
constexpr Size kSizes[] = {{2, 1}, {3, 5}, {65, 8}, {257, 24}, {1030, 64}, {70, 300}, {40000, 3}};

DType wide_of(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

/// Values around `offset`, which is what cancels in a variance.
Tensor offset_values(const Size& s, DType dtype, double offset) {
  Numbers values = normal_values(s.rows * s.width, "x");
  for (double& v : values) v += offset;
  return tensor_of({s.rows, s.width}, values, dtype);
}

struct Statistics {
  Numbers mean, var;

  Statistics(const Numbers& x, const Size& s) : mean(s.width), var(s.width) {
    for (size_t i = 0; i < x.size(); ++i) mean[i % s.width] += x[i] / static_cast<double>(s.rows);
    for (size_t i = 0; i < x.size(); ++i) var[i % s.width] += std::pow(x[i] - mean[i % s.width], 2) / static_cast<double>(s.rows);
  }
};

}  // namespace

TEST_CASE("batch statistics: mean, deviation, and running averages as PyTorch's", "[kernels]") {
  for (const Size& s : kSizes)
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16})
      for (const double offset : {0.0, 300.0, 1e7}) {
        if (offset > 300 && dtype != DType::f64) continue;
        CAPTURE(s.rows, s.width, to_string(dtype), offset);
        const Tensor x = offset_values(s, dtype, offset);
        const Statistics want(x.to_vector<double>(), s);
        const DType wide = wide_of(dtype);
        Numbers rstd(s.width), run_mean(s.width), run_var(s.width);
        for (int64_t c = 0; c < s.width; ++c) {
          rstd[c] = 1 / std::sqrt(want.var[c] + 1e-5);
          run_mean[c] = 0.9 * 0.5 + 0.1 * want.mean[c];
          run_var[c] = 0.9 * 2 + 0.1 * want.var[c] * static_cast<double>(s.rows) / static_cast<double>(s.rows - 1);
        }
        const double tolerance = dtype == DType::f64 ? (offset > 300 ? 1e-8 : 1e-12) : 2e-6;
        const Tensor mean = Tensor::empty({s.width}, wide), dev = empty_like(mean), running_mean = empty_like(mean),
                     running_var = empty_like(mean);
        for (const auto& run : implementations(kernels::batch_statistics)) {
          kernels::fill(running_mean, 0.5), kernels::fill(running_var, 2);
          run(x, 1e-5, 0.1, mean, dev, running_mean, running_var);
          expect(mean, want.mean, tolerance);
          // Near an offset of 300 the deviations themselves carry the rounding of the mean.
          expect(dev, rstd, offset == 0 ? 4 * tolerance : dtype == DType::f64 ? std::max(1e-9, 4 * tolerance) : 2e-4);
          expect(running_mean, run_mean, tolerance);
          expect(running_var, run_var, 4 * tolerance);
          run(x, 1e-5, 0.1, mean, dev, Tensor(), Tensor());
          expect(mean, want.mean, tolerance);
        }
      }
  const Tensor one = Tensor::zeros({3}, DType::f32);
  CHECK_THROWS_WITH(kernels::batch_statistics(Tensor::zeros({1, 3}, DType::f32), 1e-5, 0.1, one, one, Tensor(), Tensor()),
                    Catch::Contains("more than one row"));
}

TEST_CASE("batch norm and its gradient are their formulas, and affine makes the same bits of xhat", "[kernels]") {
  for (const Size& s : kSizes)
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
      CAPTURE(s.rows, s.width, to_string(dtype));
      const DType wide = wide_of(dtype);
      const Tensor x = offset_values(s, dtype, 0.5), dy = random({s.rows, s.width}, dtype, "dy");
      const Tensor gamma = random({s.width}, wide, "gamma"), beta = random({s.width}, wide, "beta");
      const Numbers vx = x.to_vector<double>(), vdy = dy.to_vector<double>(), vg = gamma.to_vector<double>(), vb = beta.to_vector<double>();
      const Statistics of(vx, s);
      Numbers h(vx.size()), y(vx.size()), dx(vx.size()), dgamma(s.width), dbeta(s.width), deviation(s.width);
      for (int64_t c = 0; c < s.width; ++c) deviation[c] = 1 / std::sqrt(of.var[c] + 1e-3);
      // As rounded to what the kernel is given: near a variance of 0 it magnifies the mean's last digit.
      const Tensor mean = tensor_of({s.width}, of.mean, wide), dev = tensor_of({s.width}, deviation, wide);
      const Numbers center = mean.to_vector<double>(), rstd = dev.to_vector<double>();
      Numbers y_terms(vx.size()), dx_terms(vx.size());
      for (size_t i = 0; i < vx.size(); ++i) {
        const size_t c = i % s.width;
        h[i] = (vx[i] - center[c]) * rstd[c];
        y[i] = vg[c] * h[i] + vb[c];
        y_terms[i] = std::fabs(vg[c] * h[i]) + std::fabs(vb[c]);
      }
      const double eps = dtype == DType::f64 ? 1e-12 : dtype == DType::f32 ? 2e-6 : 0.008;
      const Tensor got = empty_like(x), xhat = empty_like(x), again = empty_like(x), to_gamma = empty_like(gamma),
                   to_beta = empty_like(gamma);
      const auto norms = implementations(kernels::batch_norm);
      for (size_t which = 0; which < norms.size(); ++which) {
        norms[which](x, mean, dev, gamma, beta, got, xhat);
        expect(got, y, eps, y_terms);
        expect(xhat, h, eps);
        if (dtype != DType::bf16) {
          implementations(kernels::affine)[which](xhat, gamma, beta, again);
          CHECK(again.to_vector<double>() == got.to_vector<double>());
        }
        norms[which](x, mean, dev, gamma, beta, again, Tensor());
        CHECK(again.to_vector<double>() == got.to_vector<double>());

        const Numbers kept = xhat.to_vector<double>();  // as rounded
        std::fill(dgamma.begin(), dgamma.end(), 0), std::fill(dbeta.begin(), dbeta.end(), 0);
        Numbers terms(s.width);
        for (size_t i = 0; i < vx.size(); ++i) {
          dgamma[i % s.width] += vdy[i] * kept[i], dbeta[i % s.width] += vdy[i];
          terms[i % s.width] += std::fabs(vdy[i]) * (1 + std::fabs(kept[i]));
        }
        implementations(kernels::batch_norm_sums)[which](dy, xhat, to_gamma, to_beta);
        expect(to_gamma, dgamma, dtype == DType::f64 ? 1e-14 : 1e-6, terms);
        expect(to_beta, dbeta, dtype == DType::f64 ? 1e-14 : 1e-6, terms);
        for (size_t i = 0; i < vx.size(); ++i) {
          const size_t c = i % s.width;
          const double factor = vg[c] * rstd[c], rows = static_cast<double>(s.rows);
          dx[i] = factor * (vdy[i] - (dbeta[c] + kept[i] * dgamma[c]) / rows);
          dx_terms[i] = std::fabs(factor) * (std::fabs(vdy[i]) + terms[c] * (1 + std::fabs(kept[i])) / rows);
        }
        implementations(kernels::batch_norm_grad)[which](dy, xhat, dev, gamma, to_gamma, to_beta, again);
        expect(again, dx, dtype == DType::f64 ? 1e-12 : dtype == DType::f32 ? 2e-6 : 0.008, dx_terms);
      }
    }
}

TEST_CASE("batch statistics and sums do not depend on the number of threads", "[kernels]") {
  const int threads = omp_get_max_threads();
  const Tensor x = random({3000, 40}, DType::f32, "x"), xhat = random({3000, 40}, DType::f32, "xhat");
  const auto results = [&](int n) {
    omp_set_num_threads(n);
    const Tensor a = Tensor::empty({40}, DType::f32), b = empty_like(a), c = empty_like(a), d = empty_like(a);
    kernels::batch_statistics(x, 1e-5, 0.1, a, b, Tensor(), Tensor());
    kernels::batch_norm_sums(x, xhat, c, d);
    std::vector<Numbers> all;
    for (const Tensor* t : {&a, &b, &c, &d}) all.push_back(t->to_vector<double>());
    return all;
  };
  const auto alone = results(1), together = results(3);
  omp_set_num_threads(threads);
  CHECK(alone == together);
}

TEST_CASE("inverse deviations are those of the running variance", "[kernels]") {
  const Tensor var = Tensor::from<float>({3}, {0.0f, 1.0f, 4.0f}), rstd = empty_like(var);
  for (const auto& run : implementations(kernels::inverse_deviation)) {
    run(var, 1e-4, rstd);
    expect(rstd, {100, 1 / std::sqrt(1.0001), 1 / std::sqrt(4.0001)}, 1e-6);
  }
}
