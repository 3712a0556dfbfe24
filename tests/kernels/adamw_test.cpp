// AdamW against hand-computed steps and a long run in double, on every instruction set this CPU has.
#include <catch2/catch.hpp>
#include <cmath>

#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/optimizer.h"
#include "support/kernels.h"

using namespace mesa;
using namespace mesa::testing;

namespace {

/// torch.optim.AdamW's update, spelled as its documentation does.
struct Reference {
  std::vector<double> w, m, v;

  void step(const std::vector<double>& gradient, const kernels::AdamWStep& s, double weight_decay) {
    for (size_t i = 0; i < w.size(); ++i) {
      const double g = gradient[i] * s.gradient_scale;
      w[i] -= s.lr * weight_decay * w[i];
      m[i] = s.beta1 * m[i] + (1 - s.beta1) * g;
      v[i] = s.beta2 * v[i] + (1 - s.beta2) * g * g;
      const double m_hat = m[i] / (1 - std::pow(s.beta1, s.step)), v_hat = v[i] / (1 - std::pow(s.beta2, s.step));
      w[i] -= s.lr * m_hat / (std::sqrt(v_hat) + s.eps);
    }
  }
};

}  // namespace

TEST_CASE("adamw's first steps by hand", "[kernels]") {
  // lr 0.1, betas 0.9 and 0.99, eps 0, decay 0.5, gradient 2 then 4 (halved by the scale: 1, 2), w 1.
  // Step 1: w 1 * 0.95 - 0.1 * 1 = 0.85. Step 2: m 0.29, v 0.0499; m_hat 0.29 / 0.19, v_hat 0.0499 / 0.0199.
  const double second = 0.85 * 0.95 - 0.1 * (0.29 / 0.19) / std::sqrt(0.0499 / 0.0199);
  for (const DType dtype : {DType::f32, DType::f64})
    for (const auto& run : implementations(kernels::adamw)) {
      const Tensor w = Tensor::empty({1}, dtype), g = Tensor::empty({1}, dtype);
      const Tensor m = Tensor::zeros({1}, dtype), v = Tensor::zeros({1}, dtype);
      kernels::fill(w, 1);
      kernels::fill(g, 2);
      const double slack = dtype == DType::f64 ? 1e-14 : 2e-7;
      run({{w, g, m, v, {}, 0.5}}, {0.1, 0.9, 0.99, 0, 0.5, 1});
      expect(w, {0.85}, slack);
      expect(m, {0.1}, slack);
      expect(v, {0.01}, slack);
      kernels::fill(g, 4);
      run({{w, g, m, v, {}, 0.5}}, {0.1, 0.9, 0.99, 0, 0.5, 2});
      expect(w, {second}, slack);
    }
}

TEST_CASE("adamw over many steps and sizes, with a bf16 copy", "[kernels]") {
  for (const int64_t n : {1, 3, 17, 64, 197, 768, 20001})
    for (const DType dtype : {DType::f32, DType::f64})
      for (const auto& run : implementations(kernels::adamw)) {
        const Tensor w = random({n}, dtype, "w"), m = Tensor::zeros({n}, dtype), v = Tensor::zeros({n}, dtype);
        const Tensor copy = Tensor::empty({n}, DType::bf16), rounded = Tensor::empty({n}, DType::bf16);
        Reference want{w.to_vector<double>(), m.to_vector<double>(), v.to_vector<double>()};
        for (int64_t t = 1; t <= 20; ++t) {
          const Tensor g = random({n}, dtype, ("g" + std::to_string(t)).c_str(), 0.01);
          const kernels::AdamWStep step{1e-2, 0.9, 0.999, 1e-8, 0.7, t};
          want.step(g.to_vector<double>(), step, 0.05);
          run({{w, g, m, v, t % 2 ? copy : Tensor(), 0.05}}, step);
          if (t == 19) kernels::copy(w, rounded);
        }
        expect(w, want.w, dtype == DType::f64 ? 1e-13 : 2e-6);
        expect(m, want.m, dtype == DType::f64 ? 1e-13 : 1e-8);
        expect(v, want.v, dtype == DType::f64 ? 1e-13 : 1e-9);
        CHECK(copy.to_vector<float>() == rounded.to_vector<float>());
      }
}

TEST_CASE("adamw lets a NaN gradient show and refuses a step 0", "[kernels]") {
  const Tensor w = Tensor::zeros({20}, DType::f32), g = Tensor::zeros({20}, DType::f32), m = Tensor::zeros({20}, DType::f32);
  const Tensor v = Tensor::zeros({20}, DType::f32);
  g.data<float>()[5] = NAN;
  kernels::adamw(std::vector<kernels::UpdateSlot>{{w, g, m, v, {}, 0.05}}, kernels::AdamWStep{1e-3, 0.9, 0.999, 1e-8, 1, 1});
  for (int i = 0; i < 20; ++i) CHECK(std::isnan(w.data<float>()[i]) == (i == 5));
  CHECK_THROWS_AS(
      kernels::adamw(std::vector<kernels::UpdateSlot>{{w, g, m, v, {}, 0.05}}, kernels::AdamWStep{1e-3, 0.9, 0.999, 1e-8, 1, 0}), Error);
}
