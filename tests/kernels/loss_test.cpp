// Cross entropies and their gradients against double arithmetic, on every instruction set this CPU has.
#include "mesa/kernels/loss.h"

#include <omp.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>

#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/norm.h"
#include "support/kernels.h"

using namespace mesa;
using namespace mesa::testing;

namespace {

double tolerance(DType dtype) { return dtype == DType::f64 ? 1e-13 : dtype == DType::f32 ? 2e-6 : 0.008; }

constexpr int64_t kClasses[] = {1, 3, 10, 17, 100, 1000, 2500};

std::vector<double> log_softmax(const std::vector<double>& x, int64_t classes) {
  std::vector<double> out = x;
  for (size_t row = 0; row < x.size(); row += classes) {
    double top = x[row], sum = 0;
    for (int64_t k = 0; k < classes; ++k) top = std::max(top, x[row + k]);
    for (int64_t k = 0; k < classes; ++k) sum += std::exp(x[row + k] - top);
    for (int64_t k = 0; k < classes; ++k) out[row + k] = x[row + k] - top - std::log(sum);
  }
  return out;
}

struct Want {
  std::vector<double> loss, grad;
};
/// Loss of each row and the gradient of `upstream` times their mean.
Want reference(const std::vector<double>& logits, const std::vector<double>& targets, int64_t classes, double upstream) {
  const std::vector<double> logs = log_softmax(logits, classes);
  const int64_t batch = static_cast<int64_t>(logits.size()) / classes;
  Want out{std::vector<double>(batch), logits};
  for (size_t i = 0; i < logits.size(); ++i) {
    out.loss[i / classes] -= targets[i] * logs[i];
    out.grad[i] = upstream / static_cast<double>(batch) * (std::exp(logs[i]) - targets[i]);
  }
  return out;
}

Tensor value(double v, DType dtype) {
  const Tensor out = Tensor::empty({1}, dtype);
  kernels::fill(out, v);
  return out;
}

}  // namespace

TEST_CASE("cross entropy with labels", "[kernels]") {
  const int64_t batch = 19;
  for (const int64_t classes : kClasses)
    for (const DType dtype : {DType::f32, DType::f64})
      for (const double smoothing : {0.0, 0.1}) {
        CAPTURE(classes, to_string(dtype), smoothing);
        const Tensor logits = random({batch, classes}, dtype, "logits", 3), loss = Tensor::empty({batch}, dtype);
        std::vector<int64_t> labels(batch);
        std::vector<double> targets(batch * classes, smoothing / static_cast<double>(classes));
        for (int64_t b = 0; b < batch; ++b) labels[b] = b * 7 % classes, targets[b * classes + labels[b]] += 1 - smoothing;
        const Tensor label = Tensor::from<int64_t>({batch}, labels), grad = empty_like(logits);
        const Want want = reference(logits.to_vector<double>(), targets, classes, 2.5);
        for (const auto& run : implementations(kernels::cross_entropy)) {
          run(logits, label, smoothing, loss);
          expect(loss, want.loss, tolerance(dtype));
        }
        for (const auto& run : implementations(kernels::cross_entropy_grad)) {
          run(value(2.5, dtype), logits, label, smoothing, grad);
          expect(grad, want.grad, tolerance(dtype));
        }
      }
}

TEST_CASE("cross entropy with soft targets", "[kernels]") {
  const int64_t batch = 19;
  for (const int64_t classes : kClasses)
    for (const DType dtype : {DType::f32, DType::f64}) {
      CAPTURE(classes, to_string(dtype));
      const Tensor logits = random({batch, classes}, dtype, "logits", 3), loss = Tensor::empty({batch}, dtype);
      const Tensor targets = empty_like(logits), grad = empty_like(logits);
      kernels::softmax(random({batch, classes}, dtype, "targets"), targets);
      const Want want = reference(logits.to_vector<double>(), targets.to_vector<double>(), classes, 0.5);
      for (const auto& run : implementations(kernels::cross_entropy_soft)) {
        run(logits, targets, loss);
        expect(loss, want.loss, tolerance(dtype));
      }
      for (const auto& run : implementations(kernels::cross_entropy_soft_grad)) {
        run(value(0.5, dtype), logits, targets, grad);
        expect(grad, want.grad, tolerance(dtype));
      }
    }
}

TEST_CASE("cross entropy of extreme logits", "[kernels]") {
  const float infinity = std::numeric_limits<float>::infinity();
  const Tensor logits = Tensor::from<float>({3, 4}, {1000, 0, -1000, 0, 5, -infinity, 5, 5, 0, NAN, 0, 0});
  const Tensor labels = Tensor::from<int64_t>({3}, {2, 0, 0}), loss = Tensor::empty({3}, DType::f32), grad = empty_like(logits);
  for (size_t i = 0; i < implementations(kernels::cross_entropy).size(); ++i) {
    implementations(kernels::cross_entropy)[i](logits, labels, 0.0, loss);
    CHECK(loss.data<float>()[0] == 2000.0f);
    CHECK(loss.data<float>()[1] == Approx(std::log(3.0)));
    CHECK(std::isnan(loss.data<float>()[2]));
    implementations(kernels::cross_entropy_grad)[i](value(3, DType::f32), logits, labels, 0.0, grad);
    for (int k = 0; k < 4; ++k) {
      CHECK(grad.data<float>()[k] == (k == 0 ? 1.0f : k == 2 ? -1.0f : 0.0f));
      CHECK(std::isnan(grad.data<float>()[8 + k]));
    }
  }
}

TEST_CASE("targets of mixed samples are their smoothed labels in the proportion of the shares", "[kernels]") {
  const std::vector<float> shares{1, 0.25f, 0, 0.5f};
  const std::vector<int64_t> labels{2, 0, 2, 1};
  const Tensor mixing = Tensor::empty({4, Mixing::kNumbers}, DType::f32), label = Tensor::from<int64_t>({4}, labels);
  kernels::fill(mixing, 7);
  for (int64_t b = 0; b < 4; ++b) mixing.data<float>()[b * Mixing::kNumbers + 5] = shares[b];
  for (const int64_t classes : {3, 50, 100})
    for (const DType dtype : {DType::f32, DType::f64})
      for (const double smoothing : {0.0, 0.1})
        for (const bool mixed : {false, true}) {
          CAPTURE(classes, to_string(dtype), smoothing, mixed);
          std::vector<double> want(4 * classes, smoothing / static_cast<double>(classes));
          for (int64_t b = 0; b < 4; ++b) {
            const double share = mixed ? shares[b] : 1;
            want[b * classes + labels[b]] += (1 - smoothing) * share;
            want[b * classes + labels[b ^ 1]] += (1 - smoothing) * (1 - share);
          }
          const Tensor targets = Tensor::empty({4, classes}, dtype);
          for (const auto& run : implementations(kernels::mixed_targets)) {
            run(label, mixed ? mixing : Tensor(), smoothing, -1, targets);
            expect(targets, want, tolerance(dtype));
            run(label, mixed ? mixing : Tensor(), smoothing, 0.2, targets);
            std::vector<double> sharp = want;
            for (double& t : sharp) t = t > 0.2 ? 1 : 0;
            expect(targets, sharp, 0);
          }
        }
  const Tensor odd = Tensor::empty({3, Mixing::kNumbers}, DType::f32), three = Tensor::from<int64_t>({3}, {0, 0, 0});
  CHECK_THROWS_WITH(kernels::plain::mixed_targets(three, odd, 0, -1, Tensor::empty({3, 2}, DType::f32)),
                    Catch::Matchers::Contains("3 is odd"));
}

TEST_CASE("binary cross entropy is that of each class by itself", "[kernels]") {
  const int64_t batch = 7;
  for (const int64_t classes : kClasses)
    for (const DType dtype : {DType::f32, DType::f64}) {
      CAPTURE(classes, to_string(dtype));
      const Tensor logits = random({batch, classes}, dtype, "logits", 4), loss = Tensor::empty({batch}, dtype), grad = empty_like(logits);
      std::vector<double> targets(batch * classes), want_loss(batch), want_grad;
      for (size_t i = 0; i < targets.size(); ++i) targets[i] = static_cast<double>(i * 5 % 9) / 8;
      const std::vector<double> x = logits.to_vector<double>();
      for (size_t i = 0; i < targets.size(); ++i) {
        const double p = 1 / (1 + std::exp(-x[i]));
        const double q = 1 / (1 + std::exp(x[i]));  // 1 - p, without cancellation
        want_loss[i / classes] -= (targets[i] * std::log(p) + (1 - targets[i]) * std::log(q)) / static_cast<double>(classes);
        want_grad.push_back(2.5 * (p - targets[i]) / static_cast<double>(batch * classes));
      }
      for (const auto& run : implementations(kernels::binary_cross_entropy)) {
        run(logits, tensor_of({batch, classes}, targets, dtype), loss);
        expect(loss, want_loss, tolerance(dtype));
      }
      for (const auto& run : implementations(kernels::binary_cross_entropy_grad)) {
        run(value(2.5, dtype), logits, tensor_of({batch, classes}, targets, dtype), grad);
        expect(grad, want_grad, tolerance(dtype));
      }
    }
}

TEST_CASE("binary cross entropy of extreme logits", "[kernels]") {
  const float infinity = std::numeric_limits<float>::infinity();
  const Tensor logits = Tensor::from<float>({3, 2}, {1000, -1000, -infinity, 0, NAN, 0});
  const Tensor targets = Tensor::from<float>({3, 2}, {0, 1, 0, 0.5f, 0, 0}), loss = Tensor::empty({3}, DType::f32),
               grad = empty_like(logits);
  for (size_t i = 0; i < implementations(kernels::binary_cross_entropy).size(); ++i) {
    implementations(kernels::binary_cross_entropy)[i](logits, targets, loss);
    CHECK(loss.data<float>()[0] == 1000.0f);
    CHECK(loss.data<float>()[1] != loss.data<float>()[1]);  // 0 x infinity: no number, as PyTorch has it
    CHECK(std::isnan(loss.data<float>()[2]));
    implementations(kernels::binary_cross_entropy_grad)[i](value(6, DType::f32), logits, targets, grad);
    const std::vector<float> want{1, -1, 0, 0};
    for (int k = 0; k < 4; ++k) CHECK(grad.data<float>()[k] == want[k]);
    CHECK(std::isnan(grad.data<float>()[4]));
  }
}

TEST_CASE("argmax is the first of the largest", "[kernels]") {
  const Tensor labels = Tensor::empty({3}, DType::i64);
  for (const int64_t classes : {1, 5, 1000})
    for (const DType dtype : {DType::f32, DType::f64}) {
      std::vector<double> x = random({3, classes}, dtype, "x").to_vector<double>();
      x[classes - 1] = 50;
      x[classes / 2] = 50;
      x[2 * classes] = 60;
      for (const auto& run : implementations(kernels::argmax)) {
        run(tensor_of({3, classes}, x, dtype), labels);
        const auto row = x.begin() + classes;
        CHECK(labels.to_vector<int64_t>() == std::vector<int64_t>{classes / 2, std::max_element(row, row + classes) - row, 0});
        std::vector<double> odd = x;
        odd[classes - 1] = NAN;  // of the first row, behind a larger one in the middle
        for (int64_t k = 0; k < classes; ++k) odd[classes + k] = NAN;
        run(tensor_of({3, classes}, odd, dtype), labels);
        CHECK(labels.to_vector<int64_t>() == std::vector<int64_t>{classes - 1, 0, 0});
      }
    }
}

TEST_CASE("mean_all is exact and does not depend on the number of threads", "[kernels]") {
  const int threads = omp_get_max_threads();
  for (const int64_t n : {1, 17, 8192, 50001})
    for (const DType dtype : {DType::f32, DType::f64}) {
      const Tensor x = random({n}, dtype, "x"), y = Tensor::empty({1}, dtype);
      double sum = 0;
      for (const double v : x.to_vector<double>()) sum += v;
      for (const auto& run : implementations(kernels::mean_all)) {
        run(x, y);
        expect(y, {sum / static_cast<double>(n)}, dtype == DType::f64 ? 1e-13 : 1e-7);
        const double first = y.to_vector<double>()[0];
        omp_set_num_threads(2);
        run(x, y);
        omp_set_num_threads(1);
        CHECK(y.to_vector<double>()[0] == first);
        run(x, y);
        CHECK(y.to_vector<double>()[0] == first);
        omp_set_num_threads(threads);
      }
    }
}
