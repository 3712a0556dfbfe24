// Every optimizer and the moving average against PyTorch and timm (golden/optim.py wrote the numbers); states; what an average does.
#include "mesa/optim/optimizer.h"

#include <algorithm>
#include <barrier>
#include <catch2/catch.hpp>
#include <cmath>
#include <functional>
#include <memory>
#include <thread>

#include "mesa/kernels/elementwise.h"
#include "mesa/optim/adamw.h"
#include "mesa/optim/ema.h"
#include "mesa/optim/lamb.h"
#include "mesa/optim/sgd.h"
#include "mesa/train/safetensors.h"
#include "support/device.h"
#include "support/paths.h"
#include "support/worst.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

using Numbers = std::vector<double>;
using Make = std::function<std::unique_ptr<Optimizer>(std::deque<Param>&, OptimizerShard)>;

const std::map<std::string, Make>& optimizers() {
  static const std::map<std::string, Make> all{{"adamw",
                                                [](auto& p, auto shard) {
                                                  return std::make_unique<AdamW>(p, AdamWConfig{1, 0.1, 0.8, 0.95, 1e-6}, shard);
                                                }},
                                               {"sgd",
                                                [](auto& p, auto shard) {
                                                  return std::make_unique<Sgd>(p, SgdConfig{0.1, 0, false}, shard);
                                                }},
                                               {"momentum",
                                                [](auto& p, auto shard) {
                                                  return std::make_unique<Sgd>(p, SgdConfig{0.1, 0.9, false}, shard);
                                                }},
                                               {"nesterov",
                                                [](auto& p, auto shard) {
                                                  return std::make_unique<Sgd>(p, SgdConfig{0.1, 0.9, true}, shard);
                                                }},
                                               {"lamb",
                                                [](auto& p, auto shard) {
                                                  return std::make_unique<Lamb>(p, LambConfig{0.1, 0.8, 0.95, 1e-6, false}, shard);
                                                }},
                                               {"lambc", [](auto& p, auto shard) {
                                                  return std::make_unique<Lamb>(p, LambConfig{0.1, 0.8, 0.95, 1e-6, true}, shard);
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
    for (size_t i = 0; i < got.size(); ++i) worst = worse(worst, std::abs(got[i] - want[i]) / std::max(1.0, std::abs(want[i])));
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
      const auto optimizer = make(net.params, {});
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
      const auto optimizer = optimizers().at("adamw")(net.params, {});
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
      auto optimizer = maker(net.params, {});
      for (int64_t t = 1; t <= 6; ++t) {
        if (t == restart_at) {
          auto fresh = maker(net.params, {});
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
    const auto optimizer = make(net.params, {});
    CHECK(optimizer->state().size() == (name == "sgd" ? 0 : name == "momentum" || name == "nesterov" ? 4 : 8));
    if (name != "sgd") CHECK_THROWS_WITH(optimizer->load_state({}, 1), Contains("the optimizer state has no weight/"));
  }
}

namespace {

/// Two ranks as threads: what one gives, the other gets, too.
class TwoRanks {
 public:
  OptimizerShard shard(size_t rank, const std::deque<Param>& params) {
    return {ranges_[rank], [this, rank](const Tensor& x) { add_up(rank, x); },
            [this, rank, &params](const std::vector<Tensor>& parts, const OptimizerShard::Each& f) { gather(rank, parts, params, f); }};
  }
  /// Of the arena of `Halves`: each rank has one half of the first parameter's place, and the first that of the two in the middle.
  const std::vector<std::vector<ArenaRange>>& ranges() const { return ranges_; }

 private:
  void add_up(size_t rank, const Tensor& x) {
    const Tensor host = to(x, kCpu);
    given_[rank] = host.to_vector<double>();
    meet_.arrive_and_wait();
    Numbers sum = given_[0];
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += given_[1][i];
    meet_.arrive_and_wait();
    transfer(Tensor::from<double>(x.shape(), sum), x);
  }
  void gather(size_t rank, const std::vector<Tensor>& parts, const std::deque<Param>& params, const OptimizerShard::Each& f) {
    parts_[rank] = parts;
    meet_.arrive_and_wait();
    const Tensor whole = Tensor::zeros({96}, parts[0].dtype());
    for (size_t r = 0; r < 2; ++r)
      for (size_t i = 0; i < parts.size(); ++i)
        transfer(to(parts_[r][i], kCpu), whole.narrow(0, ranges_[r][i].begin, ranges_[r][i].count()));
    meet_.arrive_and_wait();
    for (const Param& p : params) f(p, whole.narrow(0, p.grad.offset(), p.grad.numel()).reshape(p.grad.shape()));
  }

  std::vector<std::vector<ArenaRange>> ranges_{{{0, 24}, {48, 72}}, {{24, 48}, {72, 96}}};
  std::barrier<> meet_{2};

 public:
  /// Where one of them has failed: the other is not kept waiting.
  void leave() { meet_.arrive_and_drop(); }

 private:
  Numbers given_[2];
  std::vector<Tensor> parts_[2];
};

/// The golden parameters with their gradients in an arena.
struct Halves : Golden {
  explicit Halves(DType dtype) : Golden(dtype) {
    const Tensor arena = Tensor::zeros({96}, dtype, test_device(), MemoryKind::gradients);
    int64_t at = 0;
    for (Param& p : params) {
      p.grad = arena.narrow(0, at, p.value.numel()).reshape(p.value.shape());
      at += (p.value.numel() + 15) / 16 * 16;
    }
  }
};

}  // namespace

TEST_CASE("optimizers: shared by two ranks each makes the steps of one, with half of the state") {
  if (test_device() == kCuda) return;  // the emulated GPU has one host thread
  for (const auto& [name, make] : optimizers()) {
    INFO(name);
    const Make& maker = make;
    Halves alone(DType::f64);
    const auto optimizer = maker(alone.params, {});
    std::vector<double> norms;
    for (int64_t t = 1; t <= 6; ++t) {
      alone.differentiate(t);
      norms.push_back(optimizer->gradient_norm());
      optimizer->step(0.02 * static_cast<double>(t));
    }
    const std::map<std::string, Tensor> state = optimizer->state();

    TwoRanks ranks;
    Halves nets[2]{Halves(DType::f64), Halves(DType::f64)};
    std::vector<double> norms_of[2];
    std::map<std::string, Tensor> states[2];
    const auto work = [&](size_t rank) {
      Halves& net = nets[rank];
      auto own = maker(net.params, ranks.shard(rank, net.params));
      for (int64_t t = 1; t <= 6; ++t) {
        if (t == 4) {  // as a resume does it
          const std::map<std::string, Tensor> whole = own->state();
          auto fresh = maker(net.params, ranks.shard(rank, net.params));
          fresh->load_state(whole, own->steps());
          own = std::move(fresh);
        }
        net.differentiate(t);
        norms_of[rank].push_back(own->gradient_norm());
        own->step(0.02 * static_cast<double>(t));
      }
      states[rank] = own->state();
    };
    std::exception_ptr failed[2];
    const auto guarded = [&](size_t rank) {
      try {
        work(rank);
      } catch (...) {
        failed[rank] = std::current_exception();
        ranks.leave();
      }
    };
    std::thread other(guarded, 1);
    guarded(0);
    other.join();
    for (const std::exception_ptr& error : failed)
      if (error) std::rethrow_exception(error);
    const bool exact = name.substr(0, 4) != "lamb";  // whose norms are added up in another order
    for (size_t rank = 0; rank < 2; ++rank) {
      REQUIRE(states[rank].size() == state.size());
      for (const auto& [what, moment] : state) CHECK(states[rank].at(what).to_vector<double>() == moment.to_vector<double>());
      for (size_t i = 0; i < norms.size(); ++i) CHECK(norms_of[rank][i] == Approx(norms[i]).epsilon(1e-12));
      for (size_t k = 0; k < alone.params.size(); ++k) {
        const Numbers want = alone.params[k].value.to_vector<double>(), got = nets[rank].params[k].value.to_vector<double>();
        for (size_t i = 0; i < want.size(); ++i) {
          const int64_t at = alone.params[k].grad.offset() + static_cast<int64_t>(i);
          for (const ArenaRange& range : ranks.ranges()[rank])
            if (at >= range.begin && at < range.end) CHECK(got[i] == (exact ? Approx(want[i]).epsilon(0) : Approx(want[i]).epsilon(1e-12)));
        }
      }
    }
  }
}

TEST_CASE("optimizers: a shard that fails with one moment comes to the next all the same") {
  Halves net(DType::f32);
  int gathers = 0;
  OptimizerShard shard{{{0, 24}, {48, 72}}, {}, [&](const std::vector<Tensor>&, const OptimizerShard::Each&) {
                         if (++gathers == 1) throw std::bad_alloc();
                       }};
  const AdamW half(net.params, {}, shard);
  CHECK_THROWS_AS(half.state(), std::bad_alloc);
  CHECK(gathers == 2);
}

TEST_CASE("optimizers: a shard's moments take no more than its ranges, and a parameter is cut once at most") {
  const auto held = [] { return Allocator::of(test_device()).use().of(MemoryKind::optimizer); };
  Halves net(DType::f32);
  const int64_t before = held();
  const AdamW half(net.params, {}, {{{0, 24}, {48, 72}}});
  CHECK(half.sharded());
  CHECK(held() - before == 2 * 48 * 4);
  CHECK_THROWS_WITH(AdamW(net.params, {}, {{{0, 4}, {8, 12}}}), Contains("two ranges of a shard hold pieces of weight"));
}

TEST_CASE("optimizers: the moments are memory of the optimizer, and sgd without momentum takes none") {
  const auto held = [] { return Allocator::of(test_device()).use().of(MemoryKind::optimizer); };
  Golden net(DType::f32);
  const int64_t before = held(), bytes = (35 + 4 + 6 + 9) * 4;
  for (const auto& [name, make] : optimizers()) {
    const auto optimizer = make(net.params, {});
    INFO(name);
    CHECK(held() - before == bytes * (name == "sgd" ? 0 : name == "momentum" || name == "nesterov" ? 1 : 2));
  }
  const Ema ema(net.params, {});
  CHECK(held() - before == bytes);
}

TEST_CASE("ema: in use the parameters hold the averages, also after an exception they hold their own values again") {
  Golden net(DType::f32);
  net.params[2].trainable = false;  // stands for a buffer
  const auto optimizer = optimizers().at("nesterov")(net.params, {});
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

TEST_CASE("ema: resumed from its state it goes on bit for bit, and begun anew it is the present values") {
  const auto run = [](int64_t restart_at) {
    Golden net(DType::f32);
    const auto optimizer = optimizers().at("adamw")(net.params, {});
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
