// Layers and the parameter store: names, freezing, the gradient arena, and layers that say what does not fit.
#include "mesa/nn/layers.h"

#include <omp.h>

#include <catch2/catch.hpp>
#include <cmath>
#include <functional>
#include <type_traits>

#include "mesa/base/scope.h"
#include "support/gradcheck.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

TEST_CASE("store: names are unique and found, or the nearest is told") {
  ParamStore store;
  const Builder build(store, 1);
  const Scope scope("blocks.0");
  Linear::make(build, "fc1", 4, 6);
  CHECK(store.at("blocks.0.fc1.weight").value.shape() == Shape{6, 4});
  CHECK(store.count() == 30);
  CHECK_THROWS_WITH(store.at("blocks.0.fc1.weigth"), Contains("the nearest is blocks.0.fc1.weight"));
  CHECK_THROWS_WITH(Linear::make(build, "fc1", 4, 6), Contains("two parameters are named blocks.0.fc1.weight"));
  CHECK_THROWS_WITH(store.freeze("nothing*"), Contains("no parameter matches 'nothing*'"));
  store.freeze("*.bias");
  CHECK_FALSE(store.at("blocks.0.fc1.bias").trainable);
  CHECK(store.at("blocks.0.fc1.weight").trainable);
}

TEST_CASE("store: gradients lie in one arena, the last parameter first, and frozen ones have none") {
  ParamStore store;
  const Builder build(store, 1);
  const Linear a = Linear::make(build, "a", 5, 3), b = Linear::make(build, "b", 3, 7);
  a.bias->trainable = false;
  store.allocate_gradients();
  CHECK_FALSE(a.bias->grad.defined());
  CHECK(a.weight->grad.buffer() == b.bias->grad.buffer());
  CHECK(b.bias->grad.offset() < b.weight->grad.offset());
  CHECK(b.weight->grad.offset() < a.weight->grad.offset());
  for (const Param& p : store.params())
    if (p.trainable) CHECK(p.grad.offset() * 4 % 64 == 0);
}

TEST_CASE("layers: values depend on seed and name, not on what was made before") {
  ParamStore one, two;
  Linear::make(Builder(one, 7), "other", 3, 3);
  const Linear a = Linear::make(Builder(one, 7), "x", 4, 4), b = Linear::make(Builder(two, 7), "x", 4, 4);
  CHECK(a.weight->value.to_vector<float>() == b.weight->value.to_vector<float>());
  CHECK(one.at("other.weight").value.to_vector<float>()[0] != a.weight->value.to_vector<float>()[0]);
}

TEST_CASE("layers: initial values are one stream's, however many threads draw them") {
  constexpr int64_t kCount = 20001;
  const int threads = omp_get_max_threads();
  const auto narrow = [](RandomStream& r) { return 0.02 * r.normal(); };
  const auto cut = [](RandomStream& r) {
    double x = r.normal();
    while (std::fabs(x) >= 2) x = r.normal();
    return x;
  };
  const auto even = [](RandomStream& r) { return r.uniform(-0.1, 0.1); };
  const std::vector<std::pair<Init, std::function<double(RandomStream&)>>> kinds{
      {Init::normal(0.02), narrow}, {Init::truncated_normal(0.02), narrow}, {Init::truncated_normal(1), cut}, {Init::uniform(0.1), even}};
  for (const auto& [init, next] : kinds) {
    CAPTURE(static_cast<int>(init.kind), init.value);
    RandomStream random(RandomKey::of(7, "weight", 0));
    std::vector<float> want;
    for (int64_t i = 0; i < kCount; ++i) want.push_back(static_cast<float>(next(random)));
    for (const int count : {1, 3}) {
      omp_set_num_threads(count);
      ParamStore store;
      CHECK(Builder(store, 7).param("weight", {kCount}, init, true).value.to_vector<float>() == want);
    }
  }
  omp_set_num_threads(threads);
}

TEST_CASE("layers: fused and explicit attention are the same function with the same gradients") {
  INFO(seed_note());
  std::vector<Numbers> results[2];
  for (AttentionKind kind : {AttentionKind::fused, AttentionKind::explicit_}) {
    ParamStore store;
    const Builder build(store, 3, DType::f64, DType::f64);
    const Attention layer = Attention::make(build, "attn", 12, 3, {kind, true, 0, 0});
    StoragePolicy policy = one_codec("exact");
    Param x;
    x.value = normal_tensor({2, 5, 12}, "x", DType::f64);
    Tape tape(policy);
    const Var y = layer(x);
    tape.backward({y}, {normal_tensor({2, 5, 12}, "dy", DType::f64)});
    std::vector<Numbers>& result = results[kind == AttentionKind::explicit_];
    result = {y.value().to_vector<double>(), x.grad.to_vector<double>()};
    for (const Param& p : store.params()) result.push_back(p.grad.to_vector<double>());
  }
  for (size_t i = 0; i < results[0].size(); ++i) CHECK(largest_difference(results[0][i], results[1][i]) <= 1e-12);
}

TEMPLATE_TEST_CASE("layers: a block of which the first tokens are read does nothing more for the others, and these are the same", "",
                   Attention, ReducedAttention) {
  INFO(seed_note());
  ParamStore store;
  const Builder build(store, 3, DType::f64, DType::f64);
  Block<TestType> block{"block", 2, 0, LayerNorm::make(build, "norm1", 8), LayerNorm::make(build, "norm2", 8), {}, {}};
  if constexpr (std::is_same_v<TestType, Attention>)
    block.attn = Attention::make(build, "attn", 8, 2, {});
  else
    block.attn = ReducedAttention::make(build, "attn", 8, 2, 0, 0, 1, true, 0);
  block.mlp = Mlp::make(build, "mlp", 8, 16, 0);
  struct Pass {
    std::vector<Numbers> numbers;
    double kept;
  };
  const auto pass = [&](int64_t first, bool spared, double drop_path) {
    store.clear_gradients();
    block.drop_path = drop_path;
    StoragePolicy policy = one_codec("exact");
    Param x;
    x.value = normal_tensor({3, 7, 8}, "x", DType::f64);
    const auto activations = [] { return Allocator::of(kCpu).use().of(MemoryKind::activations); };
    const int64_t before = activations();
    Tape tape(policy);
    const Var y = spared ? block(x, first) : first_tokens(block(x), first);
    Pass out{{y.value().to_vector<double>()}, static_cast<double>(activations() - before)};
    tape.backward({y}, {normal_tensor({3, first, 8}, "dy", DType::f64)});
    out.numbers.push_back(x.grad.to_vector<double>());
    for (const Param& p : store.params()) out.numbers.push_back(p.grad.to_vector<double>());
    return out;
  };
  for (const auto& [first, drop_path] : {std::pair<int64_t, double>{1, 0}, {2, 0}, {7, 0}, {1, 0.5}, {2, 0.5}}) {
    CAPTURE(first, drop_path);
    const Pass spared = pass(first, true, drop_path), whole = pass(first, false, drop_path);
    for (size_t i = 0; i < whole.numbers.size(); ++i) CHECK(largest_difference(spared.numbers[i], whole.numbers[i]) <= 1e-12);
    CHECK((first == 7 || spared.kept < 0.75 * whole.kept));
  }
}

TEST_CASE("layers: what does not fit is refused") {
  ParamStore store;
  const Builder build(store, 1);
  CHECK_THROWS_WITH(Attention::make(build, "a", 10, 3, {AttentionKind::fused, true, 0, 0}),
                    Contains("width 10 does not divide by 3 heads"));
  CHECK_THROWS_WITH(Attention::make(build, "b", 12, 3, {AttentionKind::fused, true, 0, 0.1}), Contains("needs model.attention: explicit"));
  const Linear layer = Linear::make(build, "c", 4, 2);
  CHECK_THROWS_WITH(layer(normal_tensor({2, 5}, "x")), Contains("c: linear: x ends in 5 but the weight is [2, 4]"));
}

TEST_CASE("layers: bf16 products read a copy of the weight that follows the master") {
  Param p;
  p.name = "w";
  p.value = Tensor::from<float>({2}, {1, 2});
  CHECK(p.as(DType::f32).buffer() == p.value.buffer());
  CHECK(p.as(DType::bf16).to_vector<float>() == std::vector<float>{1, 2});
  p.value.data<float>()[0] = 4;
  p.touch();
  CHECK(p.as(DType::bf16).to_vector<float>() == std::vector<float>{4, 2});
  CHECK(p.as(DType::bf16).buffer()->kind() == MemoryKind::parameters);
}
