// The tape's invariants: what it keeps alive, when it lets go, and how gradients come together.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <map>
#include <set>

#include "mesa/base/scope.h"
#include "support/errors.h"
#include "support/gradcheck.h"
#include "support/tiny_vit.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;
using Catch::Matchers::StartsWith;

namespace {

/// The identity, which notes something when the backward pass comes by.
Var watch(const Var& x, const std::function<void()>& note) {
  const Op op("watch", {x});
  return op.record(x.value(), [note](const Tensor& dy) -> Grads {
    note();
    return {dy};
  });
}

/// A gradient of ones into `y`.
void backward_of_ones(Tape& tape, const Var& y, const std::function<void(Param&)>& ready = {}) {
  tape.backward({y}, {tensor_of(y.shape(), Numbers(y.value().numel(), 1.0), y.dtype())}, ready);
}

}  // namespace

TEST_CASE("tape: behind a residual connection layer_norm adds to the other branch's gradient, in its place") {
  INFO(seed_note());
  const Shape shape{64, 96};
  Param w = make_param("w", shape), gamma = make_param("gamma", {96}), beta = make_param("beta", {96});
  Allocator& memory = Allocator::of(w.value.device());
  // What the pass takes at most beside what there is; the gradient lands in w.
  const auto backward = [&](bool inspected, bool shared) {
    StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}});
    Tape tape(policy);
    if (inspected) tape.inspect([](const Tensor&, const std::string&) {});
    w.grad_written = gamma.grad_written = beta.grad_written = false;
    const Var x = scale(Var(w), 2), y = add(shared ? x : scale(x, 3), layer_norm(x, Var(gamma), Var(beta), 1e-6));
    const Tensor dy = normal_tensor(shape, "dy");
    memory.reset_peak();
    const int64_t before = memory.use().total;
    tape.backward({y}, {dy});
    return memory.use().peak - before;
  };
  for (const bool shared : {false, true}) {  // add hands dy to both: nobody may write to it
    CAPTURE(shared);
    backward(true, shared);  // there are gradients now
    const int64_t apart = backward(true, shared);
    const std::vector<double> want = w.grad.to_vector<double>();
    const int64_t together = backward(false, shared);
    const std::vector<double> got = w.grad.to_vector<double>();
    for (size_t i = 0; i < want.size(); ++i) REQUIRE(std::fabs(got[i] - want[i]) <= 1e-5 * std::max(1.0, std::fabs(want[i])));
    CHECK(apart - together == (shared ? 0 : shape.numel() * size_of(DType::f32)));
  }
}

TEST_CASE("tape: exact activations die after forward, only what the sites keep stays") {
  INFO(seed_note());
  VitConfig config = tiny_config();
  for (AttentionKind kind : {AttentionKind::fused, AttentionKind::explicit_}) {
    config.attention = kind;
    const TinyVit net(config);
    StoragePolicy policy = simple_policy({{"*", "int8", {}, ""}});
    const int64_t before = live_activations(), total_before = Allocator::of(test_device()).use().total;
    Tape tape(policy);
    const Var loss = net.loss();
    int64_t kept = 0, exact = 0;
    for (const SiteRecord& site : policy.sites()) kept += site.kept_bytes, exact += site.exact_bytes;
    CHECK(live_activations() - before == kept);
    CHECK(kept * 3 < exact);  // statistics and logits stay exact, all else is a quarter
    // Nothing hides under another kind: the loss itself is 4 bytes, and a site has two counters.
    CHECK(Allocator::of(test_device()).use().total - total_before <= kept + 64 + 32 * static_cast<int64_t>(policy.sites().size()));
    tape.backward(loss);
    CHECK(live_activations() == before);
  }
}

TEST_CASE("tape: backward destroys each step at once, so that activation memory only falls") {
  INFO(seed_note());
  Param p = make_param("p", {64, 64});
  StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}});
  const auto on_the_cpu = [] { return Allocator::of(kCpu).use().of(MemoryKind::activations); };  // where p is
  std::vector<int64_t> seen;
  const int64_t before = on_the_cpu();
  Tape tape(policy);
  const auto chain = [&] {
    Var x = scale(p, 1.0);
    for (int i = 0; i < 6; ++i) {
      const Scope scope(concat("layer", i));
      x = gelu(watch(x, [&] { seen.push_back(on_the_cpu() - before); }));
    }
    return x;
  };
  // The last value is copied so that no Var of the chain outlives it.
  const Var y = scale(chain(), 1.0);
  REQUIRE(on_the_cpu() - before == 6 * 64 * 64 * 4);
  backward_of_ones(tape, y);
  REQUIRE(seen.size() == 6);
  for (size_t i = 0; i < seen.size(); ++i) CHECK(seen[i] == static_cast<int64_t>(5 - i) * 64 * 64 * 4);
}

TEST_CASE("tape: activation memory falls from hook to hook in a whole network") {
  const TinyVit net;
  StoragePolicy policy = simple_policy({{"*", "int8", {}, ""}});
  Tape tape(policy);
  const Var loss = net.loss();
  std::vector<int64_t> seen{live_activations()};
  tape.backward(loss, [&](Param&) { seen.push_back(live_activations()); });
  CHECK(std::is_sorted(seen.rbegin(), seen.rend()));
  CHECK(std::set(seen.begin(), seen.end()).size() > 15);  // step by step, not all at the end
}

TEST_CASE("tape: a gradient that two values share is not written into") {
  Param a = make_param("a", {3, 5}), b = make_param("b", {3, 5});
  StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}});
  Tape tape(policy);
  // c hands its gradient to a and b; a's other uses must add to a copy of it.
  const Var va = scale(a, 1.0), vb = scale(b, 1.0), c = va + vb;
  const Var y = (c + scale(va, 2.0)) + scale(va, 4.0);
  backward_of_ones(tape, y);
  CHECK(a.grad.to_vector<double>() == Numbers(15, 7.0));
  CHECK(b.grad.to_vector<double>() == Numbers(15, 1.0));
}

TEST_CASE("tape: the caller's gradient is left alone") {
  Param a = make_param("a", {4});
  StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}});
  Tape tape(policy);
  const Var x = scale(a, 1.0), y = scale(x, 3.0);
  const Tensor dx = tensor_of({4}, Numbers(4, 1.0), DType::f32), dy = tensor_of({4}, Numbers(4, 1.0), DType::f32);
  tape.backward({x, y}, {dx, dy});
  CHECK(a.grad.to_vector<double>() == Numbers(4, 4.0));
  CHECK(dx.to_vector<double>() == Numbers(4, 1.0));
  CHECK(dy.to_vector<double>() == Numbers(4, 1.0));
}

TEST_CASE("tape: ready comes once for each parameter, when nothing more is added to its gradient") {
  INFO(seed_note());
  TinyVit net;
  StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}});
  Tape tape(policy);
  const Var loss = net.loss();
  std::map<std::string, Numbers> at_ready;
  std::vector<std::string> order;
  tape.backward(loss, [&](Param& p) {
    CHECK(at_ready.count(p.name) == 0);
    at_ready[p.name] = p.grad.to_vector<double>();
    order.push_back(p.name);
  });
  CHECK(at_ready.size() == net.store.params().size());
  for (const Param& p : net.store.params()) CHECK(at_ready[p.name] == p.grad.to_vector<double>());
  REQUIRE(!order.empty());
  CHECK_THAT(order.front(), StartsWith("head."));  // the last layer is ready first: its bucket leaves while the rest is computed
}

TEST_CASE("tape: a parameter used twice is ready after its first use in the forward") {
  Param w = make_param("w", {4, 4}), x = make_param("x", {2, 4});
  StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}});
  Tape tape(policy);
  const Var y = linear(linear(x, w), w);
  Numbers at_ready;
  int calls = 0;
  backward_of_ones(tape, y, [&](Param& p) {
    if (&p != &w) return;
    ++calls;
    at_ready = p.grad.to_vector<double>();
  });
  CHECK(calls == 1);
  CHECK(at_ready == w.grad.to_vector<double>());
}

TEST_CASE("tape: without a tape nothing is recorded or kept") {
  const TinyVit net;
  StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}});
  const int64_t before = live_activations();
  {
    const Var loss = net.loss();
    CHECK_FALSE(loss.requires_grad());
    CHECK(live_activations() == before);
  }
  CHECK(policy.sites().empty());
}

TEST_CASE("tape: frozen parameters keep no activations") {
  TinyVit net;
  StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}});
  SECTION("everything: nothing is recorded") {
    net.store.freeze("*");
    Tape tape(policy);
    const Var loss = net.loss();
    CHECK(tape.steps() == 0);
    CHECK(policy.sites().empty());
    CHECK_THROWS_WITH(tape.backward(loss), Contains("did not compute from anything trainable"));
  }
  SECTION("all but the head: only its input") {
    net.store.freeze("[!h]*");
    Tape tape(policy);
    const Var loss = net.loss();
    for (const SiteRecord& site : policy.sites()) {
      INFO(site.site.name());
      CHECK((site.site.name() == "head:x" || site.codec == "statistic"));
    }
    tape.backward(loss);
    CHECK(net.store.at("head.weight").grad_written);
    CHECK_FALSE(net.store.at("blocks.0.mlp.fc1.weight").grad_written);
  }
  SECTION("one linear layer in the middle: its input alone is missing") {
    net.store.freeze("blocks.1.mlp.fc1.weight");
    Tape tape(policy);
    const Var loss = net.loss();
    std::set<std::string> names;
    for (const SiteRecord& site : policy.sites()) names.insert(site.site.name());
    CHECK(names.count("blocks.1.mlp.fc1:x") == 0);
    CHECK(names.count("blocks.0.mlp.fc1:x") == 1);
    tape.backward(loss);
    CHECK_FALSE(net.store.at("blocks.1.mlp.fc1.weight").grad_written);
    CHECK(net.store.at("blocks.1.mlp.fc1.bias").grad_written);
  }
}

TEST_CASE("tape: gradients of two half batches add up to those of the whole") {
  INFO(seed_note());
  TinyVit net(tiny_config(), 4, DType::f64);
  StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}});
  const auto gradients = [&](int64_t parts) {
    net.store.clear_gradients();
    const int64_t n = 4 / parts;
    for (int64_t part = 0; part < parts; ++part) {
      Tape tape(policy, 0, part);
      const Var loss = cross_entropy(net.model(net.images.narrow(0, part * n, n)), net.labels.narrow(0, part * n, n));
      tape.backward(loss, {}, 1.0 / static_cast<double>(parts));
    }
    std::vector<Numbers> all;
    for (const Param& p : net.store.params()) all.push_back(p.grad.to_vector<double>());
    return all;
  };
  const auto whole = gradients(1), halves = gradients(2), singles = gradients(4);
  for (size_t i = 0; i < whole.size(); ++i) {
    INFO(net.store.params()[i].name);
    CHECK(largest_difference(halves[i], whole[i]) <= 1e-13);
    CHECK(largest_difference(singles[i], whole[i]) <= 1e-13);
  }
}

TEST_CASE("tape: tapes nest, and a failing backward leaves them as they were") {
  Param p = make_param("p", {2});
  StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}});
  CHECK(Tape::current() == nullptr);
  {
    Tape outer(policy);
    {
      Tape inner(policy);
      CHECK(Tape::current() == &inner);
      const Var y = watch(p, [] { fail("on purpose"); });
      CHECK_THROWS_AS(backward_of_ones(inner, y), Error);
      CHECK(Tape::current() == &inner);
    }
    CHECK(Tape::current() == &outer);
  }
  CHECK(Tape::current() == nullptr);
}

TEST_CASE("tape: backward consumes the tape, and needs a gradient for each output") {
  StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}});
  const TinyVit net;
  Tape tape(policy);
  const Var loss = net.loss();
  CHECK_THAT(error_of([&] { tape.backward({loss}, std::vector<Tensor>{}); }), Contains("0 gradients for 1 outputs"));
  tape.backward(loss);
  CHECK_THAT(error_of([&] { tape.backward(loss); }), Contains("was run back already"));
}

TEST_CASE("tape: errors begin with the scope path") {
  Param a = make_param("a", {2, 3}), b = make_param("b", {3, 2});
  StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}});
  Tape tape(policy);
  const Scope outer("blocks.3"), inner("mlp");
  CHECK_THAT(error_of([&] { a + b; }), StartsWith("blocks.3.mlp: cannot add [2, 3] and [3, 2]") && Contains("arithmetic.cpp:"));
  CHECK_THAT(error_of([&] { tape.backward(scale(a, 1.0)); }), Contains("a loss of one element") && Contains("[2, 3]"));
  CHECK_THAT(error_of([&] { backward_of_ones(tape, Var(a)); }), Contains("did not compute"));
  CHECK_THAT(error_of([&] {
               cross_entropy(a, Tensor::from<int64_t>({2}, {1, 3}));
             }),
             Contains("sample 1 of the batch has label 3") && Contains("3 classes"));
}

TEST_CASE("tape: check_finite names the first op that goes wrong") {
  Param p = make_param("p", {2, 2});
  p.value.data<float>()[0] = INFINITY;
  StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}});
  Tape tape(policy);
  tape.check_finite();
  const Scope scope("blocks.7");
  const Var y = gelu(scale(p, 2.0));
  CHECK(tape.first_bad() == "blocks.7.scale");
}

TEST_CASE("tape: dropout masks what comes from frozen layers too, and nothing without a tape") {
  Param p = make_param("p", {1000});
  p.trainable = false;
  StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}});
  const auto zeros = [&] {
    int64_t n = 0;
    for (double v : dropout(p, 0.5).value().to_vector<double>()) n += v == 0;
    return n;
  };
  CHECK(zeros() == 0);
  Tape tape(policy);
  CHECK(std::abs(zeros() - 500) < 100);
  CHECK(tape.steps() == 0);
}
