// Every optimizer and the moving average against PyTorch and timm (golden/optim.py wrote the numbers); states; what an average does.
#include "mesa/optim/optimizer.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <functional>
#include <memory>

#include "mesa/kernels/elementwise.h"
#include "mesa/optim/adamw.h"
#include "mesa/optim/ema.h"
#include "mesa/optim/lamb.h"
#include "mesa/optim/sgd.h"
#include "mesa/train/safetensors.h"
#include "support/device.h"
#include "support/paths.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

using Numbers = std::vector<double>;
using Make = std::function<std::unique_ptr<Optimizer>(std::deque<Param>&)>;

const std::map<std::string, Make>& optimizers() {
  static const std::map<std::string, Make> all{{"adamw",
                                                [](auto& p) {
                                                  return std::make_unique<AdamW>(p, AdamWConfig{1, 0.1, 0.8, 0.95, 1e-6});
                                                }},
                                               {"sgd",
                                                [](auto& p) {
                                                  return std::make_unique<Sgd>(p, SgdConfig{0.1, 0, false});
                                                }},
                                               {"momentum",
                                                [](auto& p) {
                                                  return std::make_unique<Sgd>(p, SgdConfig{0.1, 0.9, false});
                                                }},
                                               {"nesterov",
                                                [](auto& p) {
                                                  return std::make_unique<Sgd>(p, SgdConfig{0.1, 0.9, true});
                                                }},
                                               {"lamb",
                                                [](auto& p) {
                                                  return std::make_unique<Lamb>(p, LambConfig{0.1, 0.8, 0.95, 1e-6, false});
                                                }},
                                               {"lambc", [](auto& p) {
                                                  return std::make_unique<Lamb>(p, LambConfig{0.1, 0.8, 0.95, 1e-6, true});
                                                }}};
  return all;
}

struct Golden {
  SafetensorsFile file = read_safetensors(source_dir() + "/tests/golden/optim.safetensors");
  std::deque<Param> params;

  explicit Golden(DType dtype) {
    for (const char* name : {"weight", "zero", "scaled", "bias"}) {
      Param p;
      p.name = name;
      p.decay = p.name != "bias";
      p.lr_scale = p.name == "scaled" ? 0.5 : 1;
      p.value = converted(at(concat("start/", name)), dtype, MemoryKind::parameters);
      p.grad = Tensor::empty(p.value.shape(), dtype, test_device(), MemoryKind::gradients);
      params.push_back(std::move(p));
    }
  }
  const Tensor& at(const std::string& name) const {
    const Tensor* t = file.find(name);
    check(t != nullptr, "the golden file has no ", name);
    return *t;
  }
  static Tensor converted(const Tensor& x, DType dtype, MemoryKind kind = MemoryKind::workspace) {
    const Tensor narrow = Tensor::empty(x.shape(), dtype, kCpu, kind);
    kernels::copy(x, narrow);
    return to(narrow, test_device(), kind);
  }
  /// The gradients of step t = 1 .. 10.
  void differentiate(int64_t t) {
    for (Param& p : params) {
      transfer(converted(at("gradient/" + p.name).select(0, t - 1), p.value.dtype()), p.grad);
      p.grad_written = true;
    }
  }
  void check_close(const std::string& what, const std::string& name, const Tensor& x) const {
    INFO(what << "/" << name << " in " << to_string(x.dtype()));
    const Numbers got = x.to_vector<double>(), want = at(what + "/" + name).to_vector<double>();
    REQUIRE(got.size() == want.size());
    double worst = 0;
    for (size_t i = 0; i < got.size(); ++i) worst = std::max(worst, std::abs(got[i] - want[i]) / std::max(1.0, std::abs(want[i])));
    CHECK(worst <= (x.dtype() == DType::f64 ? 1e-12 : 1e-5));
  }
  std::vector<Numbers> values() const {
    std::vector<Numbers> out;
    for (const Param& p : params) out.push_back(p.value.to_vector<double>());
    return out;
  }
};

}  // namespace

TEST_CASE("optimizers: ten steps of each are PyTorch's or timm's") {
  for (const auto& [name, make] : optimizers())
    for (const DType dtype : {DType::f64, DType::f32}) {
      Golden net(dtype);
      const auto optimizer = make(net.params);
      for (int64_t t = 1; t <= 10; ++t) {
        net.differentiate(t);
        optimizer->step(0.02 * static_cast<double>(t));
        if (t == 1 || t == 10)
          for (const Param& p : net.params) net.check_close(concat(name, "/", t), p.name, p.value);
      }
    }
}

TEST_CASE("ema: the averages of ten steps are those of timm's ModelEmaV3") {
  for (const bool warmup : {false, true})
    for (const DType dtype : {DType::f64, DType::f32}) {
      Golden net(dtype);
      const auto optimizer = optimizers().at("adamw")(net.params);
      Ema ema(net.params, {0.7, warmup});
      for (int64_t t = 1; t <= 10; ++t) {
        net.differentiate(t);
        optimizer->step(0.02 * static_cast<double>(t));
        ema.update();
        if (t == 1 || t == 10)
          for (const auto& [name, average] : ema.state()) net.check_close(concat(warmup ? "warm_average/" : "average/", t), name, average);
      }
      CHECK(ema.updates() == 10);
    }
}

TEST_CASE("optimizers: resumed from its state each goes on bit for bit, and refuses what is not its own") {
  for (const auto& [name, make] : optimizers()) {
    INFO(name);
    const Make& maker = make;
    const auto run = [&](int64_t restart_at) {
      Golden net(DType::f32);
      auto optimizer = maker(net.params);
      for (int64_t t = 1; t <= 6; ++t) {
        if (t == restart_at) {
          auto fresh = maker(net.params);
          fresh->load_state(optimizer->state(), optimizer->steps());
          optimizer = std::move(fresh);
        }
        net.differentiate(t);
        optimizer->step(0.01);
      }
      return net.values();
    };
    CHECK(run(4) == run(-1));
    Golden net(DType::f32);
    const auto optimizer = make(net.params);
    CHECK(optimizer->state().size() == (name == "sgd" ? 0 : name == "momentum" || name == "nesterov" ? 4 : 8));
    if (name != "sgd") CHECK_THROWS_WITH(optimizer->load_state({}, 1), Contains("the optimizer state has no weight/"));
  }
}

TEST_CASE("optimizers: the moments are memory of the optimizer, and sgd without momentum takes none") {
  const auto held = [] { return Allocator::of(test_device()).use().of(MemoryKind::optimizer); };
  Golden net(DType::f32);
  const int64_t before = held(), bytes = (35 + 4 + 6 + 9) * 4;
  for (const auto& [name, make] : optimizers()) {
    const auto optimizer = make(net.params);
    INFO(name);
    CHECK(held() - before == bytes * (name == "sgd" ? 0 : name == "momentum" || name == "nesterov" ? 1 : 2));
  }
  const Ema ema(net.params, {});
  CHECK(held() - before == bytes);
}

TEST_CASE("ema: in use the parameters hold the averages, also after an exception they hold their own values again") {
  Golden net(DType::f32);
  net.params[2].trainable = false;  // stands for a buffer
  const auto optimizer = optimizers().at("nesterov")(net.params);
  Ema ema(net.params, {0.9, false});
  for (Param& p : net.params) p.as(DType::bf16);
  for (int64_t t = 1; t <= 3; ++t) net.differentiate(t), optimizer->step(0.1), ema.update();
  kernels::fill(net.params[2].value, 7);  // as a norm's running mean changes by itself
  net.params[2].touch();
  const std::vector<Numbers> raw = net.values();
  std::map<std::string, Numbers> averages;
  for (const auto& [name, average] : ema.state()) averages[name] = average.to_vector<double>();
  CHECK(averages.size() == 4);
  CHECK(averages.at("scaled") == Numbers(6, 7.0));
  const auto check_raw = [&] {
    CHECK(net.values() == raw);
    for (Param& p : net.params) {
      const Tensor copy = Golden::converted(to(p.value, kCpu), DType::bf16);
      CHECK(p.as(DType::bf16).to_vector<float>() == copy.to_vector<float>());
    }
  };
  try {
    const Ema::Use use(ema);
    for (Param& p : net.params) {
      INFO(p.name);
      CHECK(p.value.to_vector<double>() == averages.at(p.name));
      CHECK((p.value.to_vector<double>() == raw[0]) == false);
      const Tensor copy = Golden::converted(to(p.value, kCpu), DType::bf16);
      CHECK(p.as(DType::bf16).to_vector<float>() == copy.to_vector<float>());
    }
    fail("", "an evaluation that fails");
  } catch (const Error&) {
  }
  check_raw();
  for (const auto& [name, average] : ema.state()) CHECK(average.to_vector<double>() == averages.at(name));
}

TEST_CASE("ema: resumed from its state it goes on bit for bit; begun anew it is the present values") {
  const auto run = [](int64_t restart_at) {
    Golden net(DType::f32);
    const auto optimizer = optimizers().at("adamw")(net.params);
    auto ema = std::make_unique<Ema>(net.params, EmaConfig{0.9, true});
    for (int64_t t = 1; t <= 8; ++t) {
      if (t == restart_at) {
        auto fresh = std::make_unique<Ema>(net.params, EmaConfig{0.9, true});
        fresh->load_state(ema->state(), ema->updates());
        ema = std::move(fresh);
      }
      net.differentiate(t), optimizer->step(0.05), ema->update();
    }
    std::vector<Numbers> out;
    for (const auto& [name, average] : ema->state()) out.push_back(average.to_vector<double>());
    return out;
  };
  CHECK(run(5) == run(-1));
  Golden net(DType::f32);
  Ema ema(net.params, {0.9, false});
  for (Param& p : net.params) kernels::fill(p.value, 3);
  ema.restart();
  for (const auto& [name, average] : ema.state()) CHECK(average.to_vector<double>() == Numbers(average.numel(), 3.0));
  CHECK_THROWS_WITH(ema.load_state({}, 1), Contains("the averaged weights have no weight"));
  CHECK_THROWS_WITH(ema.load_state({{"weight", Tensor::zeros({2}, DType::f32)}}, 1), Contains("weight is [2], not [5, 7]"));
}

TEST_CASE("ema: the decay of each update") {
  Golden net(DType::f32);
  const Ema plain(net.params, {0.99, false}), warm(net.params, {0.99, true});
  CHECK(plain.decay_of(1) == 0);
  CHECK(plain.decay_of(2) == 0.99);
  CHECK(warm.decay_of(1) == 0);
  CHECK(warm.decay_of(2) == Approx(1 - std::pow(2.0, -2.0 / 3)));
  CHECK(warm.decay_of(999) == Approx(1 - std::pow(999.0, -2.0 / 3)));
  CHECK(warm.decay_of(1001) == 0.99);
}
