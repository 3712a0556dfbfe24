// Running ranges: what lies outside them, what moves them and what must not, and state that survives a restart.
#include <catch2/catch.hpp>
#include <cmath>

#include "mesa/base/scope.h"
#include "support/errors.h"
#include "support/gradcheck.h"
#include "support/tiny_vit.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

const CodecOptions kRunning{{"groups", "layer"}, {"range", "running"}, {"decay", "0.9"}, {"rounding", "nearest"}};

}  // namespace

TEST_CASE("running ranges: values outside are clamped at both ends and counted") {
  StoragePolicy policy = simple_policy({{"*", "int8", kRunning, ""}});
  policy.begin(1, 1);
  const Tensor first = Tensor::from<float>({4}, {-1, 0, 0.5, 1});
  policy.save(first, {"a", "x"}, nullptr);
  const Saved saved = policy.save(Tensor::from<float>({4}, {-100, 100, 0.25, 1.25}), {"a", "x"}, nullptr);
  const Numbers x = saved.get().to_vector<double>();
  CHECK(x[0] == Approx(-1));
  CHECK(x[1] == Approx(1));  // a wrapped code would give the other end, -1
  CHECK(x[2] == Approx(0.25).margin(1.0 / 255));
  CHECK(x[3] == Approx(1));
  CHECK(record_of(policy, "a:x").saturated == 3);
  CHECK(record_of(policy, "a:x").elements == 8);
  policy.reset_counts();
  CHECK(record_of(policy, "a:x").saturated == 0);
}

TEST_CASE("running ranges: the estimate follows the formula, and a packed value carries the scale of its own time") {
  StoragePolicy policy = simple_policy({{"*", "int8", kRunning, ""}});
  policy.begin(1, 1);
  const Saved first = policy.save(Tensor::from<float>({3}, {-1, 0, 3}), {"a", "x"}, nullptr);
  const Numbers before = first.get().to_vector<double>();
  for (int i = 0; i < 3; ++i) policy.save(Tensor::from<float>({3}, {-10, 0, 90}), {"a", "x"}, nullptr);
  CHECK(first.get().to_vector<double>() == before);
  CHECK(before[0] == Approx(-1).margin(1e-6));
  CHECK(before[2] == Approx(3).margin(1e-6));
  double range = 4, low = -1;
  for (int i = 0; i < 3; ++i) range = 0.9 * range + 0.1 * 100, low = 0.9 * low + 0.1 * -10;
  CHECK(policy.state().at("a:x/alpha").to_vector<double>()[0] == Approx(range));
  CHECK(policy.state().at("a:x/beta").to_vector<double>()[0] == Approx(low));
}

TEST_CASE("running ranges: a second forward before the backward changes no gradient") {
  INFO(seed_note());
  TinyVit net;
  const auto gradients = [&](bool second) {
    StoragePolicy policy = simple_policy({{"*", "int8", {{"groups", "heads"}, {"range", "running"}}, ""}});
    net.store.clear_gradients();
    Tape tape(policy, 3, 1);
    const Var loss = net.loss();
    if (second) {
      Tape other(policy, 3, 2);
      net.loss();
    }
    tape.backward(loss);
    std::vector<Numbers> all;
    for (const Param& p : net.store.params()) all.push_back(p.grad.to_vector<double>());
    return all;
  };
  CHECK(gradients(false) == gradients(true));
}

TEST_CASE("running ranges: state saved and loaded goes on bit for bit, and belongs to its policy alone") {
  INFO(seed_note());
  const std::vector<StorageRule> rules{{"*", "int4", {{"groups", "heads"}, {"range", "running"}}, ""}};
  const auto pass = [](StoragePolicy& policy, int step) {
    policy.begin(9, step);
    const Tensor x = normal_tensor({5, 12}, "pass " + std::to_string(step));
    return policy.save(x, {"blocks.0", "x", 3}, nullptr).get().to_vector<double>();
  };
  const auto copy_of = [](const std::map<std::string, Tensor>& state) {
    std::map<std::string, Tensor> copy;
    for (const auto& [name, t] : state) copy[name] = Tensor::from(t.shape(), t.to_vector<float>());
    return copy;
  };
  StoragePolicy whole = simple_policy(rules);
  pass(whole, 0), pass(whole, 1);
  const auto state = copy_of(whole.state());
  CHECK(state.size() == 2);
  StoragePolicy resumed = simple_policy(rules);
  resumed.load_state(state);
  CHECK(resumed.state().size() == 2);  // also while no site has been seen yet: a checkpoint written at once is complete
  for (int step : {2, 3}) CHECK(pass(whole, step) == pass(resumed, step));
  CHECK(state.at("blocks.0:x/alpha").to_vector<float>() != resumed.state().at("blocks.0:x/alpha").to_vector<float>());
  StoragePolicy wrong = simple_policy({{"*", "int4", {{"groups", "layer"}, {"range", "running"}}, ""}});
  wrong.load_state(state);
  CHECK_THAT(error_of([&] { pass(wrong, 2); }), Contains("blocks.0:x has 3 groups but the tensor has 1"));
  StoragePolicy none = simple_policy({{"*", "exact", {}, ""}});
  none.load_state(state);
  CHECK_THAT(error_of([&] { pass(none, 2); }), Contains("keeps no running state"));
}

TEST_CASE("policy: running ranges are not ruined by a step with NaN") {
  StoragePolicy policy = simple_policy({{"*", "int8", kRunning, ""}});
  policy.begin(1, 1);
  policy.save(Tensor::from<float>({3}, {-1, 0, 1}), {"a", "x"}, nullptr);
  policy.save(Tensor::from<float>({3}, {-1, NAN, INFINITY}), {"a", "x"}, nullptr);
  for (const auto& [name, t] : policy.state()) CHECK(std::isfinite(t.to_vector<double>()[0]));
}

TEST_CASE("running ranges: a bad update leaves no trace") {
  StoragePolicy policy = simple_policy({{"*", "int8", kRunning, ""}});
  const auto save = [&](const char* path, std::vector<float> values) {
    return policy.save(Tensor::from<float>({static_cast<int64_t>(values.size())}, values), {path, "x"}, nullptr);
  };
  const auto alpha = [&](const char* path) {
    const auto state = policy.state();
    const auto found = state.find(std::string(path) + ":x/alpha");
    return found == state.end() ? -1.0 : found->second.to_vector<double>()[0];
  };
  policy.begin(1, 1);
  save("a", {-1, 3});
  policy.commit();
  policy.begin(1, 2);
  save("a", {-1e20f, 1e20f});
  save("new", {0, 1});
  CHECK(alpha("a") > 1e18);
  policy.roll_back();
  CHECK(alpha("a") == 4);
  CHECK(alpha("new") == -1);  // calibrates at its first good update
  save("a", {-1, 3});
  save("new", {0, 2});
  CHECK(alpha("a") == 4);
  CHECK(alpha("new") == 2);
  StoragePolicy extreme = simple_policy({{"*", "int8", kRunning, ""}});
  extreme.begin(1, 1);
  extreme.save(Tensor::from<float>({2}, {-3e38f, 3e38f}), {"a", "x"}, nullptr);
  CHECK(std::isfinite(extreme.state().at("a:x/alpha").to_vector<double>()[0]));
}
