// Policies: which rule wins, what is kept once, what is refused and how, and what is told of bad values.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <functional>

#include "mesa/base/scope.h"
#include "support/audit.h"
#include "support/errors.h"
#include "support/gradcheck.h"
#include "support/tiny_vit.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;
using Catch::Matchers::StartsWith;

TEST_CASE("policy: the last rule that matches wins") {
  StoragePolicy policy =
      simple_policy({{"*", "exact", {}, ""}, {"*:x", "int8", {}, ""}, {"*.fc2:x", "bf16", {}, ""}, {"blocks.1.*", "int4", {}, ""}});
  const TinyVit net;
  Tape tape(policy);
  net.loss();
  CHECK(record_of(policy, "blocks.0.norm1:xhat").codec == "exact");
  CHECK(record_of(policy, "blocks.0.mlp.fc1:x").codec == "int8");
  CHECK(record_of(policy, "blocks.0.mlp.fc2:x").codec == "bf16");
  CHECK(record_of(policy, "blocks.1.mlp.fc2:x").codec == "int4");
  CHECK(record_of(policy, "blocks.1.norm1:xhat").codec == "int4");
  CHECK(record_of(policy, "blocks.1.norm1:rstd").codec == "statistic");
  CHECK(record_of(policy, "blocks.2.attn.proj:x").codec == "int8");
}

TEST_CASE("policy: mistakes in rules are refused with their place and the nearest right word") {
  const auto refusal = [](StorageRule rule) { return error_of([&] { simple_policy({{"*", "exact", {}, ""}, rule}); }); };
  CHECK_THAT(refusal({"*:x", "int9", {}, "run.yaml:7"}),
             StartsWith("run.yaml:7: storage rule '*:x'") && Contains("unknown codec 'int9'") && Contains("'int"));
  CHECK_THAT(refusal({"*:x", "int8", {{"group", "heads"}}, "run.yaml:7"}),
             Contains("no option 'group'") && Contains("did you mean 'groups'?"));
  CHECK_THAT(refusal({"*:x", "int8", {{"groups", "head"}}, ""}), Contains("groups is 'head'") && Contains("heads, layer, channel"));
  CHECK_THAT(refusal({"*:x", "int8", {{"groups", "4"}}, ""}), Contains("from 8 to"));
  CHECK_THAT(refusal({"*:x", "int8", {{"groups", "0 channels"}}, ""}), Contains("'N channels'"));
  const auto bytes = [](const Shape& shape) {
    return make_codec("int8", {{"groups", "4 channels"}})->packed_bytes(shape, DType::f32, {"a", "x", 3});
  };
  CHECK(bytes({5, 8}) == 40 + 8 * 2);
  CHECK(bytes({5, 6}) == 30 + 8 * 3);         // blocks of 2, which divides both
  CHECK(bytes({2, 3, 5, 4}) == 120 + 8 * 3);  // by the second axis
  CHECK_THAT(refusal({"*:x", "int8", {{"groups", "32 canals"}}, ""}), Contains("groups is '32 canals'"));
  CHECK_THAT(refusal({"*:x", "int8", {{"rounding", "up"}}, ""}), Contains("rounding is 'up'") && Contains("stochastic or nearest"));
  CHECK_THAT(refusal({"*:x", "int8", {{"decay", "0.5"}}, ""}), Contains("decay belongs to range: running"));
  CHECK_THAT(refusal({"*:x", "int8", {{"groups", "heads"}, {"range", "running"}, {"decay", "1.5"}}, ""}), Contains("decay is '1.5'"));
  CHECK_THAT(refusal({"*:x", "int8", {{"range", "running"}}, ""}), Contains("range: running needs groups"));
  CHECK_THAT(refusal({"*:x", "exact", {{"groups", "heads"}}, ""}), Contains("'exact' has no option 'groups'"));
  CHECK_THAT(refusal({"", "exact", {}, "a.yaml:1"}), Contains("a.yaml:1") && Contains("empty match"));
  CHECK_THROWS_AS(simple_policy({{"*", "int9", {}, ""}}), UsageError);
  CHECK_THAT(error_of([] { register_codec("int8", {}, {}); }), Contains("exists already"));
}

TEST_CASE("policy: a rule that matches no site is an error that lists near ones") {
  StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}, {"blocks.0.mlp.fc3:x", "int8", {}, "s.yaml:3"}});
  const TinyVit net;
  Tape tape(policy);
  net.loss();
  const std::string error = error_of([&] { policy.check_rules_matched(); });
  CHECK_THAT(error, StartsWith("s.yaml:3: ") && Contains("'blocks.0.mlp.fc3:x' matches no site") && Contains("'blocks.0.mlp.fc"));
  CHECK_THROWS_AS(policy.check_rules_matched(), UsageError);
}

TEST_CASE("policy: a site without a rule is an error") {
  StoragePolicy policy = simple_policy({{"*.fc2:x", "exact", {}, ""}});
  const TinyVit net;
  Tape tape(policy);
  CHECK_THAT(error_of([&] { net.loss(); }),
             Contains("no storage rule of policy 'test' matches the site ") && Contains("begin the policy with"));
}

TEST_CASE("policy: rebuild needs a recipe, and says so") {
  StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}, {"*.proj:x", "rebuild", {}, "s.yaml:4"}});
  const TinyVit net;
  Tape tape(policy);
  CHECK_THAT(error_of([&] { net.loss(); }),
             Contains("s.yaml:4") && Contains("rebuilds blocks.0.attn.proj:x") && Contains("give that site a codec"));
}

TEST_CASE("policy: rebuilt values keep ten widths a token and block, and the same gradients") {
  INFO(seed_note());
  TinyVit net(tiny_config(), 4, DType::f64);
  const std::vector<StorageRule> shared{
      {"*", "exact", {}, ""}, {"*.qkv:x", "rebuild", {}, ""}, {"*.fc1:x", "rebuild", {}, ""}, {"*.fc2:x", "rebuild", {}, ""}};
  StoragePolicy exact = simple_policy({{"*", "exact", {}, ""}}), rebuild = simple_policy(shared);
  const auto gradients = [&](StoragePolicy& policy) {
    net.store.clear_gradients();
    Tape tape(policy);
    tape.backward(net.loss());
    std::vector<Numbers> all;
    for (const Param& p : net.store.params()) all.push_back(p.grad.to_vector<double>());
    return all;
  };
  const auto plain = gradients(exact), rebuilt = gradients(rebuild);
  for (size_t i = 0; i < plain.size(); ++i)
    CHECK(largest_difference(rebuilt[i], plain[i]) <= 1e-14 * std::max(1.0, largest(plain[i])));  // rounding alone
  int64_t kept = 0, statistics = 0;
  for (const SiteRecord& site : rebuild.sites())
    if (site.site.path.starts_with("blocks.1.")) (site.codec == "statistic" ? statistics : kept) += site.kept_bytes;
  const int64_t batch = 4, tokens = 17, width = 24, heads = 3, element = 8;
  CHECK(kept == 10 * batch * tokens * width * element);
  CHECK(statistics == batch * tokens * (2 + heads) * element);  // 1/std of two norms, the log-sum-exp of each head's row
}

TEST_CASE("policy: one buffer saved twice is packed once") {
  INFO(seed_note());
  StoragePolicy policy = simple_policy({{"*", "int8", {}, ""}, {"other:*", "int4", {}, ""}});
  const Tensor x = normal_tensor({4, 64}, "x");
  policy.begin(1, 1);
  const Saved a = policy.save(x, {"a", "x"}, nullptr), b = policy.save(x, {"b", "x"}, nullptr),
              other = policy.save(x, {"other", "x"}, nullptr);
  CHECK(record_of(policy, "b:x").codec == "shared");
  CHECK(record_of(policy, "b:x").kept_bytes == 0);
  CHECK(a.get().to_vector<double>() == b.get().to_vector<double>());
  CHECK(record_of(policy, "other:x").codec == "int4");  // another codec is another copy
  CHECK(record_of(policy, "other:x").kept_bytes > 0);
  const Saved view = policy.save(x.narrow(0, 1, 2), {"view", "x"}, nullptr);
  CHECK(record_of(policy, "view:x").codec == "int8");  // another view of it is another value
  CHECK(view.get().shape() == Shape{2, 64});
}

TEST_CASE("policy: a block of memory that is used again is another buffer") {
  INFO(seed_note());
  StoragePolicy policy = simple_policy({{"*", "int8", {}, ""}});
  policy.begin(1, 1);
  const Shape shape{3, 1000};
  Tensor x = tensor_of(shape, Numbers(3000, 1.0), DType::f32);
  const void* const address = x.raw();
  const Saved first = policy.save(x, {"a", "x"}, nullptr);
  x = Tensor();
  x = tensor_of(shape, Numbers(3000, 2.0), DType::f32);
  REQUIRE(x.raw() == address);  // the allocator handed the same block out: an address would name both
  const Saved second = policy.save(x, {"b", "x"}, nullptr);
  CHECK(record_of(policy, "b:x").codec == "int8");
  CHECK(first.get().to_vector<double>() == Numbers(3000, 1.0));
  CHECK(second.get().to_vector<double>() == Numbers(3000, 2.0));
}

TEST_CASE("policy: what was released is packed anew, what lives is found") {
  StoragePolicy policy = simple_policy({{"*", "int8", {}, ""}});
  policy.begin(1, 1);
  const Tensor x = normal_tensor({64}, "x");
  policy.save(x, {"a", "x"}, nullptr);
  const Saved again = policy.save(x, {"b", "x"}, nullptr);
  CHECK(record_of(policy, "b:x").codec == "int8");
  CHECK(again.get().numel() == 64);
}

TEST_CASE("codecs: a range too small to divide by is kept as one value, and the stated error says so") {
  for (const char* codec : {"int8", "int4", "int2"})
    for (const double width : {1e-44, 1e-38, 4e-38, 1e-37, 7e-37, 1e-36, 1e-30}) {
      CAPTURE(codec, width);
      StoragePolicy policy = simple_policy({{"*", codec, {{"groups", "layer"}}, ""}});
      policy.begin(1, 1);
      const Tensor x = Tensor::from<double>({3}, {0, width / 3, width});
      const Numbers back = policy.save(x, {"a", "x"}, nullptr).get().to_vector<double>();
      const double bound = make_codec(codec, {})->error_bound(0, width);
      for (int i = 0; i < 3; ++i) CHECK(std::abs(back[i] - x.data<double>()[i]) <= bound + 1e-45);
      CHECK(bound <= 1.001 * width);
    }
}

TEST_CASE("policy: NaN and infinity do not hide in a code") {
  for (const char* codec : {"int8", "int4", "int2", "bf16"})
    for (float bad : {NAN, INFINITY, -INFINITY}) {
      INFO(codec << " " << bad);
      StoragePolicy policy = simple_policy({{"*", codec, {}, ""}});
      policy.begin(1, 1);
      policy.save(Tensor::from<float>({3}, {1, 2, 3}), {"blocks.0", "x"}, nullptr);
      CHECK(policy.first_nonfinite().empty());
      policy.save(Tensor::from<float>({3}, {1, bad, 3}), {"blocks.1", "x"}, nullptr);
      policy.save(Tensor::from<float>({3}, {bad, bad, 3}), {"blocks.2", "x"}, nullptr);
      CHECK(policy.first_nonfinite() == "blocks.1:x");
      CHECK(record_of(policy, "blocks.1:x").nonfinite == 1);
      policy.begin(1, 2);
      CHECK(policy.first_nonfinite().empty());
    }
}

TEST_CASE("policy: stochastic rounding depends on seed, step and site alone") {
  INFO(seed_note());
  const Tensor x = normal_tensor({64}, "x");
  const auto decode = [&](uint64_t seed, uint64_t step, const char* site, bool another_first) {
    StoragePolicy policy = simple_policy({{"*", "int4", {}, ""}});
    policy.begin(seed, step);
    if (another_first) policy.save(normal_tensor({32}, "y"), {"other", "x"}, nullptr);
    return policy.save(x, {site, "x"}, nullptr).get().to_vector<double>();
  };
  const auto base = decode(1, 1, "a", false);
  CHECK(decode(1, 1, "a", true) == base);
  CHECK(decode(2, 1, "a", false) != base);
  CHECK(decode(1, 2, "a", false) != base);
  CHECK(decode(1, 1, "b", false) != base);
}

TEST_CASE("stochastic rounding leaves the gradient of a linear layer unbiased") {
  INFO(seed_note());
  // dw = dy^T x: with x kept in int4, the mean of many gradients must come to the exact one. An element's variance is at most
  // sum_b dy_b^2 step^2 / 4, so that six of its standard errors bound the mean; the sum of all squared z says whether they are as large
  // as they should be together.
  constexpr int64_t B = 6, I = 16, O = 5, kRounds = 2000;
  const Tensor xs = normal_tensor({B, I}, "x"), dy = normal_tensor({B, O}, "dy");
  Param w, source;
  w.value = normal_tensor({O, I}, "w");
  source.value = xs;
  const auto mean_gradient = [&](const char* rounding, int64_t rounds) {
    Numbers mean(O * I);
    StoragePolicy policy = simple_policy({{"*", "int4", {{"groups", "layer"}, {"rounding", rounding}}, ""}});
    for (int64_t round = 0; round < rounds; ++round) {
      w.grad_written = source.grad_written = false;
      Tape tape(policy, test_seed(), round);
      tape.backward({linear(source, w)}, {dy});
      const Numbers g = w.grad.to_vector<double>();
      for (size_t i = 0; i < g.size(); ++i) mean[i] += g[i] / static_cast<double>(rounds);
    }
    return mean;
  };
  const Numbers x = xs.to_vector<double>(), d = dy.to_vector<double>();
  Numbers exact(O * I), deviation(O * I);
  const double step = (*std::max_element(x.begin(), x.end()) - *std::min_element(x.begin(), x.end())) / 15;
  for (int64_t o = 0; o < O; ++o)
    for (int64_t i = 0; i < I; ++i) {
      double variance = 0;
      for (int64_t b = 0; b < B; ++b)
        exact[o * I + i] += d[b * O + o] * x[b * I + i], variance += d[b * O + o] * d[b * O + o] * step * step / 4;
      deviation[o * I + i] = std::sqrt(variance / kRounds);
    }
  const Numbers stochastic = mean_gradient("stochastic", kRounds), nearest = mean_gradient("nearest", 1);
  double z_nearest = 0;
  for (int64_t i = 0; i < O * I; ++i) {
    CHECK(std::abs(stochastic[i] - exact[i]) <= 6 * deviation[i] + 1e-5);
    z_nearest = std::max(z_nearest, std::abs(nearest[i] - exact[i]) / deviation[i]);
  }
  CHECK(z_nearest > 6);  // the same test finds the bias of rounding to nearest
}

TEST_CASE("policy: a rule for an exact statistic matches no site") {
  StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}, {"*:rstd", "int8", {}, "s.yaml:2"}});
  const TinyVit net;
  Tape tape(policy);
  net.loss();
  CHECK_THAT(error_of([&] { policy.check_rules_matched(); }), Contains("s.yaml:2") && Contains("matches no site"));
}

TEST_CASE("policy: attention keeps no output that its backward would not read") {
  StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}, {"*.attention:o", "int8", {}, ""}});
  const TinyVit net;
  Tape tape(policy);
  net.loss();
  for (const SiteRecord& site : policy.sites())
    if (site.site.name().ends_with("attention:o")) CHECK(site.kept_bytes == 0);
}

TEST_CASE("storage: where only one of q, k and v is exact, the projection that holds them all is not kept for it") {
  for (const char* slot : {"q", "k"}) {
    INFO(slot);
    StoragePolicy policy = simple_policy({{"*", "int8", {}, ""}, {concat("*:", slot), "exact", {}, ""}});
    const Var packed(to(normal_tensor({2, 9, 24}, "qkv"), test_device()));
    const Var q(to(normal_tensor({2, 9, 8}, "q"), test_device())), kv(to(normal_tensor({2, 4, 16}, "kv"), test_device()));
    Param square[3];
    for (int i = 0; i < 3; ++i) {
      const int64_t n = i == 0 ? 24 : i == 1 ? 8 : 16;
      square[i].name = concat("w", i);
      square[i].value = to(normal_tensor({n, n}, "w"), test_device(), MemoryKind::parameters);
    }
    const auto learnt = [&](const Var& x, int i) {
      const Scope scope(concat("fc", i));
      return linear(x, square[i]);
    };
    const auto within = [](const char* name, const auto& f) {
      const Scope scope(name);
      return f();
    };
    const int64_t before = live_activations();
    Tape tape(policy);
    const Var a = within("packed", [&] { return attention(learnt(packed, 0), 2, 1); });
    const Var b = within("apart", [&] { return attention(learnt(q, 1), learnt(kv, 2), 2, 1); });
    int64_t promised = 0;
    for (const SiteRecord& record : policy.sites()) promised += record.kept_bytes;
    CHECK(live_activations() - before == promised);
    CHECK((a.shape() == Shape{2, 9, 8} && b.shape() == a.shape()));
  }
}
