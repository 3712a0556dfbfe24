// AdamW against its formula, what it leaves alone, its state.
#include "mesa/optim/adamw.h"

#include <catch2/catch.hpp>
#include <cmath>

#include "support/random.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

Param make_param(const std::string& name, int64_t n, DType dtype, bool decay) {
  Param p;
  p.name = name;
  p.decay = decay;
  p.value = normal_tensor({n}, name, dtype, MemoryKind::parameters);
  p.grad = Tensor::empty({n}, dtype, kCpu, MemoryKind::gradients);
  return p;
}

void set_gradient(Param& p, int step) {
  const std::vector<double> g = normal_values(p.value.numel(), concat(p.name, " gradient ", step));
  std::memcpy(p.grad.raw(), tensor_of(p.grad.shape(), g, p.grad.dtype()).raw(), p.grad.bytes());
  p.grad_written = true;
}

}  // namespace

TEST_CASE("adamw: the formula, element by element") {
  INFO(seed_note());
  for (DType dtype : {DType::f64, DType::f32}) {
    std::deque<Param> params;
    params.push_back(make_param("w", 37, dtype, true));
    params.push_back(make_param("b", 5, dtype, false));
    const AdamWConfig config{1e-3, 0.1, 0.8, 0.95, 1e-6};
    AdamW optimizer(params, config);
    std::vector<std::vector<double>> w, m, v;
    for (Param& p : params) {
      w.push_back(p.value.to_vector<double>());
      m.emplace_back(p.value.numel());
      v.emplace_back(p.value.numel());
    }
    for (int t = 1; t <= 5; ++t) {
      const double lr = 0.01 * t, scale = 0.5;
      for (Param& p : params) set_gradient(p, t);
      optimizer.step(lr, scale);
      for (size_t k = 0; k < params.size(); ++k) {
        const auto g = params[k].grad.to_vector<double>();
        for (size_t i = 0; i < g.size(); ++i) {
          const double gs = g[i] * scale;
          m[k][i] = 0.8 * m[k][i] + 0.2 * gs;
          v[k][i] = 0.95 * v[k][i] + 0.05 * gs * gs;
          if (params[k].decay) w[k][i] *= 1 - lr * 0.1;
          w[k][i] -= lr * (m[k][i] / (1 - std::pow(0.8, t))) / (std::sqrt(v[k][i] / (1 - std::pow(0.95, t))) + 1e-6);
        }
      }
    }
    for (size_t k = 0; k < params.size(); ++k) {
      const auto x = params[k].value.to_vector<double>();
      for (size_t i = 0; i < x.size(); ++i) CHECK(std::abs(x[i] - w[k][i]) <= (dtype == DType::f64 ? 1e-13 : 1e-5));
    }
    CHECK(optimizer.steps() == 5);
  }
}

TEST_CASE("adamw: what has no gradient in a step, and what is frozen, stays as it is") {
  std::deque<Param> params;
  for (const char* name : {"a", "idle", "frozen"}) params.push_back(make_param(name, 8, DType::f32, true));
  params[2].trainable = false;
  AdamW optimizer(params, {});
  const auto idle = params[1].value.to_vector<double>(), frozen = params[2].value.to_vector<double>(),
             a = params[0].value.to_vector<double>();
  set_gradient(params[0], 0);
  optimizer.step(0.1);
  CHECK(params[1].value.to_vector<double>() == idle);
  CHECK(params[2].value.to_vector<double>() == frozen);
  CHECK(params[0].value.to_vector<double>() != a);
  CHECK(optimizer.state().size() == 4);
  for (Param& p : params) p.trainable = false;
  CHECK_THROWS_WITH(AdamW(params, {}), Contains("every parameter is frozen"));
}

TEST_CASE("adamw: the norm of all gradients, scaled, and not finite if one is not") {
  std::deque<Param> params;
  params.push_back(make_param("a", 2, DType::f32, true));
  params.push_back(make_param("b", 2, DType::f32, true));
  AdamW optimizer(params, {});
  const float values[] = {3, 0, 0, 4};
  for (int k : {0, 1}) std::memcpy(params[k].grad.raw(), values + 2 * k, 8), params[k].grad_written = true;
  CHECK(optimizer.gradient_norm() == Approx(5));
  CHECK(optimizer.gradient_norm(0.5) == Approx(2.5));
  params[1].grad.data<float>()[0] = NAN;
  CHECK_FALSE(std::isfinite(optimizer.gradient_norm()));
  params[1].grad_written = false;
  CHECK(optimizer.gradient_norm() == Approx(3));
}

TEST_CASE("adamw: resumed from its state it goes on bit for bit, and refuses another model's") {
  INFO(seed_note());
  const auto run = [](int restart_at) {
    std::deque<Param> params;
    params.push_back(make_param("w", 19, DType::f32, true));
    auto optimizer = std::make_unique<AdamW>(params, AdamWConfig{});
    for (int t = 0; t < 6; ++t) {
      if (t == restart_at) {
        auto fresh = std::make_unique<AdamW>(params, AdamWConfig{});
        fresh->load_state(optimizer->state(), optimizer->steps());
        optimizer = std::move(fresh);
      }
      set_gradient(params[0], t);
      optimizer->step(0.01);
    }
    return params[0].value.to_vector<float>();
  };
  CHECK(run(3) == run(-1));
  std::deque<Param> params;
  params.push_back(make_param("w", 3, DType::f32, true));
  AdamW optimizer(params, {});
  CHECK_THROWS_WITH(optimizer.load_state({}, 1), Contains("no w/exp_avg"));
  const Tensor wrong = Tensor::zeros({4}, DType::f32);
  CHECK_THROWS_WITH(optimizer.load_state({{"w/exp_avg", wrong}, {"w/exp_avg_sq", wrong}}, 1), Contains("w/exp_avg is [4], not [3]"));
}

TEST_CASE("adamw: the bf16 copy of a weight is refreshed in the same pass") {
  std::deque<Param> params;
  params.push_back(make_param("w", 19, DType::f32, true));
  AdamW optimizer(params, {});
  params[0].as(DType::bf16);
  set_gradient(params[0], 0);
  optimizer.step(0.1);
  const auto copy = params[0].bf16_copy().to_vector<float>(), value = params[0].value.to_vector<float>();
  for (size_t i = 0; i < copy.size(); ++i) CHECK(copy[i] == static_cast<float>(bf16(value[i])));
}
