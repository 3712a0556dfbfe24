// SGD, LAMB and the moving average against plain loops in double, on every instruction set this CPU has.
#include "mesa/kernels/optimizer.h"

#include <omp.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>

#include "mesa/kernels/elementwise.h"
#include "support/kernels.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

using Numbers = std::vector<double>;
const int64_t kSizes[] = {1, 3, 17, 64, 197, 4096, 20001};

/// Parameters of all sizes in one list, with every second a bf16 copy, decay on all but each third, and shares of the learning rate.
std::vector<kernels::UpdateSlot> slots_of(DType dtype, const std::string& stream, int moments) {
  std::vector<kernels::UpdateSlot> out;
  for (const int64_t n : kSizes) {
    const std::string name = concat(stream, n);
    kernels::UpdateSlot slot;
    slot.w = random({n}, dtype, name, n == 17 ? 0.0 : 1.0);  // one begins at zero
    slot.g = Tensor::zeros({n}, dtype);
    if (moments > 0) slot.m = Tensor::zeros({n}, dtype);
    if (moments > 1) slot.v = Tensor::zeros({n}, dtype);
    if (out.size() % 2 == 0) slot.copy = Tensor::zeros({n}, DType::bf16);
    slot.weight_decay = out.size() % 3 == 2 ? 0.0 : 0.1;
    slot.lr_scale = out.size() % 2 == 0 ? 0.5 : 1.0;
    out.push_back(slot);
  }
  return out;
}

void draw_gradients(std::vector<kernels::UpdateSlot>& slots, int64_t step) {
  for (kernels::UpdateSlot& s : slots) kernels::copy(random(s.g.shape(), s.g.dtype(), concat("g", step, " ", s.g.numel())), s.g);
}

void check_copies(const std::vector<kernels::UpdateSlot>& slots) {
  for (const kernels::UpdateSlot& s : slots) {
    if (!s.copy.defined()) continue;
    const Tensor rounded = Tensor::empty(s.w.shape(), DType::bf16);
    kernels::copy(s.w, rounded);
    CHECK(s.copy.to_vector<float>() == rounded.to_vector<float>());
  }
}

double norm_of(const Numbers& x) {
  double sum = 0;
  for (double v : x) sum += v * v;
  return std::sqrt(sum);
}

}  // namespace

TEST_CASE("sgd: plain, with momentum and with Nesterov's, against the formula", "[kernels]") {
  struct Variant {
    double momentum;
    bool nesterov;
  };
  for (const Variant& variant : {Variant{0, false}, Variant{0.9, false}, Variant{0.9, true}})
    for (const DType dtype : {DType::f32, DType::f64})
      for (const auto& run : implementations(kernels::sgd)) {
        std::vector<kernels::UpdateSlot> slots = slots_of(dtype, "sgd", variant.momentum > 0 ? 1 : 0);
        std::vector<Numbers> w, m;
        for (const auto& s : slots) w.push_back(s.w.to_vector<double>()), m.emplace_back(w.back().size());
        for (int64_t t = 1; t <= 8; ++t) {
          draw_gradients(slots, t);
          run(slots, {0.05, variant.momentum, variant.nesterov, 0.7});
          for (size_t k = 0; k < slots.size(); ++k) {
            const Numbers g = slots[k].g.to_vector<double>();
            for (size_t i = 0; i < g.size(); ++i) {
              const double d = 0.7 * g[i] + slots[k].weight_decay * w[k][i];
              m[k][i] = variant.momentum * m[k][i] + d;
              w[k][i] -= 0.05 * slots[k].lr_scale * (variant.nesterov ? d + variant.momentum * m[k][i] : m[k][i]);
            }
          }
        }
        for (size_t k = 0; k < slots.size(); ++k) {
          expect(slots[k].w, w[k], dtype == DType::f64 ? 1e-13 : 5e-6);
          if (slots[k].m.defined()) expect(slots[k].m, m[k], dtype == DType::f64 ? 1e-13 : 5e-6);
        }
        check_copies(slots);
      }
}

namespace {

/// Both passes.
std::vector<std::function<void(const std::vector<kernels::UpdateSlot>&, kernels::LambStep)>> lamb_implementations() {
  std::vector<std::function<void(const std::vector<kernels::UpdateSlot>&, kernels::LambStep)>> out;
  const auto first = implementations(kernels::lamb_moments), second = implementations(kernels::lamb);
  for (size_t i = 0; i < first.size(); ++i)
    out.push_back([moments = first[i], apply = second[i]](const auto& slots, kernels::LambStep step) {
      const Tensor squares = Tensor::empty({static_cast<int64_t>(slots.size()), 2}, DType::f64, test_device());
      moments(slots, step, squares);
      apply(slots, step, squares);
    });
  return out;
}

}  // namespace

TEST_CASE("lamb: moments, trust ratios of whole parameters, and where there are none", "[kernels]") {
  for (const bool clip : {false, true})
    for (const DType dtype : {DType::f32, DType::f64})
      for (const auto& run : lamb_implementations()) {
        std::vector<kernels::UpdateSlot> slots = slots_of(dtype, "lamb", 2);
        std::vector<Numbers> w, m, v;
        for (const auto& s : slots) w.push_back(s.w.to_vector<double>()), m.emplace_back(w.back().size()), v.emplace_back(w.back().size());
        for (int64_t t = 1; t <= 8; ++t) {
          draw_gradients(slots, t);
          run(slots, {0.05, 0.8, 0.95, 1e-6, 0.7, t, clip});
          for (size_t k = 0; k < slots.size(); ++k) {
            const Numbers g = slots[k].g.to_vector<double>();
            Numbers u(g.size());
            for (size_t i = 0; i < g.size(); ++i) {
              m[k][i] = 0.8 * m[k][i] + 0.2 * 0.7 * g[i];
              v[k][i] = 0.95 * v[k][i] + 0.05 * 0.49 * g[i] * g[i];
              u[i] = m[k][i] / (1 - std::pow(0.8, t)) / (std::sqrt(v[k][i] / (1 - std::pow(0.95, t))) + 1e-6);
              u[i] += slots[k].weight_decay * w[k][i];
            }
            double ratio = slots[k].weight_decay > 0 && norm_of(w[k]) > 0 && norm_of(u) > 0 ? norm_of(w[k]) / norm_of(u) : 1;
            if (clip) ratio = std::min(ratio, 1.0);
            for (size_t i = 0; i < g.size(); ++i) w[k][i] -= 0.05 * slots[k].lr_scale * ratio * u[i];
          }
        }
        for (size_t k = 0; k < slots.size(); ++k) {
          INFO(slots[k].w.numel() << " elements of " << to_string(dtype));
          expect(slots[k].w, w[k], dtype == DType::f64 ? 1e-12 : 2e-5);
          expect(slots[k].v, v[k], dtype == DType::f64 ? 1e-13 : 2e-6);
        }
        check_copies(slots);
      }
}

TEST_CASE("lamb: the same bits for every number of threads", "[kernels]") {
  if (test_device() == kCuda) return;
  const int before = omp_get_max_threads();
  for (const auto& run : lamb_implementations()) {
    std::vector<Numbers> results;
    for (const int threads : {1, 3, 4}) {
      omp_set_num_threads(threads);
      const Tensor w = random({100001}, DType::f32, "w"), g = random({100001}, DType::f32, "g");
      const Tensor m = Tensor::zeros(w.shape(), DType::f32), v = Tensor::zeros(w.shape(), DType::f32);
      run({{w, g, m, v, {}, 0.1, 1}}, {0.01, 0.9, 0.999, 1e-6, 1, 1, false});
      results.push_back(w.to_vector<double>());
    }
    omp_set_num_threads(before);
    CHECK(results[0] == results[1]);
    CHECK(results[0] == results[2]);
  }
}

TEST_CASE("adamw: a parameter's share of the learning rate falls on its decay, too", "[kernels]") {
  for (const DType dtype : {DType::f32, DType::f64})
    for (const auto& run : implementations(kernels::adamw)) {
      std::vector<kernels::UpdateSlot> halves = slots_of(dtype, "half", 2), wholes = slots_of(dtype, "half", 2);
      for (auto& s : halves) s.lr_scale = 0.5;
      for (auto& s : wholes) s.lr_scale = 1;
      for (int64_t t = 1; t <= 3; ++t) {
        draw_gradients(halves, t), draw_gradients(wholes, t);
        run(halves, {0.02, 0.9, 0.999, 1e-8, 1, t});
        run(wholes, {0.01, 0.9, 0.999, 1e-8, 1, t});
      }
      for (size_t k = 0; k < halves.size(); ++k) CHECK(halves[k].w.to_vector<double>() == wholes[k].w.to_vector<double>());
    }
}

TEST_CASE("moving_average: from all of the value to almost none, in torch.lerp's order", "[kernels]") {
  for (const double decay : {0.0, 0.3, 0.5, 0.9, 0.99996})
    for (const DType dtype : {DType::f32, DType::f64})
      for (const auto& run : implementations(kernels::moving_average)) {
        std::vector<kernels::AverageSlot> slots;
        std::vector<Numbers> want;
        for (const int64_t n : kSizes) {
          slots.push_back({random({n}, dtype, concat("a", n)), random({n}, dtype, concat("w", n))});
          want.push_back(slots.back().average.to_vector<double>());
          const Numbers w = slots.back().value.to_vector<double>();
          for (size_t i = 0; i < w.size(); ++i) want.back()[i] = decay * want.back()[i] + (1 - decay) * w[i];
        }
        run(slots, decay);
        for (size_t k = 0; k < slots.size(); ++k) {
          expect(slots[k].average, want[k], dtype == DType::f64 ? 1e-15 : 3e-7);
          if (decay == 0) CHECK(slots[k].average.to_vector<double>() == slots[k].value.to_vector<double>());
        }
        run(slots, 0.25);
        const Tensor same = random({197}, dtype, "same"), still = Tensor::empty({197}, dtype);
        kernels::copy(same, still);
        run({{same, still}}, decay);  // equal stays equal, bit for bit
        CHECK(same.to_vector<double>() == still.to_vector<double>());
      }
}

TEST_CASE("optimizers refuse tensors that do not fit and a step 0", "[kernels]") {
  const Tensor w = Tensor::zeros({4}, DType::f32), g = Tensor::zeros({3}, DType::f32), m = Tensor::zeros({4}, DType::f32);
  const auto updates = [](const kernels::UpdateSlot& slot) { return std::vector<kernels::UpdateSlot>{slot}; };
  CHECK_THROWS_WITH(kernels::sgd(updates({w, g, m, {}, {}, 0, 1}), kernels::SgdStep{1, 0.9, false, 1}), Contains("sgd: the gradient"));
  CHECK_THROWS_WITH(kernels::sgd(updates({w, w, {}, {}, {}, 0, 1}), kernels::SgdStep{1, 0.9, false, 1}), Contains("sgd: the first moment"));
  CHECK_NOTHROW(kernels::sgd(updates({w, w, {}, {}, {}, 0, 1}), kernels::SgdStep{1, 0, false, 1}));
  const Tensor squares = Tensor::empty({1, 2}, DType::f64, w.device());
  CHECK_THROWS_WITH(kernels::lamb(updates({w, w, m, {}, {}, 0, 1}), kernels::LambStep{1, 0.9, 0.9, 1, 1, 1, false}, squares),
                    Contains("lamb: the second moment"));
  CHECK_THROWS_WITH(kernels::lamb_moments(updates({w, w, m, m, {}, 0, 1}), kernels::LambStep{1, 0.9, 0.9, 1, 1, 1, false}, w),
                    Contains("lamb: two sums of squares in f64 for each of 1 parameters"));
  CHECK_THROWS_WITH(kernels::lamb(updates({w, w, m, m, {}, 0, 1}), kernels::LambStep{1, 0.9, 0.9, 1, 1, 0, false}, squares),
                    Contains("counted from 1"));
  CHECK_THROWS_WITH(kernels::moving_average(std::vector<kernels::AverageSlot>{{w, g}}, 0.5),
                    Contains("moving_average: tensors of shapes [4] and [3]"));
}
