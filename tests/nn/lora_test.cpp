// Low-rank adaptation: first values, the formula, what is kept, and every family's linears.
#include "mesa/nn/lora.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>

#include "mesa/base/scope.h"
#include "mesa/models/model.h"
#include "mesa/train/setup.h"
#include "support/gradcheck.h"
#include "support/tiny_vit.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

LoraOptions rank_two(std::vector<std::string> targets, double alpha = 3) {
  LoraOptions options;
  options.rank = 2, options.alpha = alpha, options.targets = std::move(targets);
  return options;
}

Builder build_f64(ParamStore& store, const LoraOptions& lora = {}) { return Builder(store, 7, DType::f64, DType::f64, kCpu, lora); }

void fill_normal(Param& param) { transfer(normal_tensor(param.value.shape(), param.name, param.value.dtype()), param.value); }

/// Freezes all but the factors.
void adapt(ParamStore& store) {
  for (Param& param : store.params()) param.trainable = is_lora_factor(param.name);
}

std::map<std::string, SiteRecord> sites_of(const StoragePolicy& policy) {
  std::map<std::string, SiteRecord> out;
  for (const SiteRecord& record : policy.sites()) out[record.site.name()] = record;
  return out;
}

}  // namespace

TEST_CASE("lora: a model with fresh factors is the base model, bit for bit, and its other values are the base's") {
  INFO(seed_note());
  const VitConfig config = tiny_config();
  ParamStore base_store, store;
  const Vit base(Builder(base_store, 11), config), model(Builder(store, 11, DType::f32, DType::f32, kCpu, rank_two({"*"})), config);
  const Tensor images = normal_tensor({3, 3, 16, 16}, "images", DType::f32, MemoryKind::inputs);
  CHECK(base(images).value().to_vector<float>() == model(images).value().to_vector<float>());
  for (const Param& param : base_store.params()) CHECK(store.at(param.name).value.to_vector<float>() == param.value.to_vector<float>());
  CHECK(store.params().size() == base_store.params().size() + 2 * (4 * 3 + 1));
  for (Param& param : store.params())
    if (is_lora_factor(param.name) && param.name.find("lora_B") != std::string::npos) fill_normal(param);
  CHECK(base(images).value().to_vector<float>() != model(images).value().to_vector<float>());
}

TEST_CASE("lora: the first factor begins as PEFT's, uniform within 1 / sqrt(in), the second as zeros") {
  ParamStore store;
  LoraOptions options = rank_two({"fc"}, 8);
  options.rank = 16;
  const Linear layer = Linear::make(Builder(store, 1, DType::f32, DType::f32, kCpu, options), "fc", 256, 5);
  REQUIRE(layer.lora);
  CHECK(layer.lora->factor == 0.5);
  CHECK(layer.lora->a->name == "fc.lora_A.weight");
  CHECK(layer.lora->a->value.shape() == Shape{16, 256});
  CHECK(layer.lora->b->name == "fc.lora_B.weight");
  CHECK(layer.lora->b->value.shape() == Shape{5, 16});
  CHECK((layer.lora->a->decay && layer.lora->b->decay));
  double sum = 0, squares = 0, greatest = 0;
  for (const float x : layer.lora->a->value.to_vector<float>())
    sum += x, squares += x * x, greatest = std::max(greatest, std::fabs(double{x}));
  CHECK(greatest <= 1.0 / 16);
  CHECK(greatest > 0.99 / 16);
  CHECK(std::fabs(sum / 4096) < 0.003);  // 5 standard deviations of the mean
  CHECK(squares / 4096 == Approx(1.0 / 256 / 3).epsilon(0.05));
  for (const float x : layer.lora->b->value.to_vector<float>()) CHECK(x == 0);
}

TEST_CASE("lora: the adapted linear is the linear of w + factor b a, also onto a residual and under LayerScale") {
  INFO(seed_note());
  const bool scaled = GENERATE(false, true), residual = GENERATE(false, true);
  CAPTURE(scaled, residual);
  ParamStore store, plain_store;
  Linear layer = Linear::make(build_f64(store, rank_two({"f?"})), "fc", 6, 4);
  Linear plain = Linear::make(build_f64(plain_store), "fc", 6, 4);
  for (Param& param : store.params()) fill_normal(param);
  const Numbers a = layer.lora->a->value.to_vector<double>(), b = layer.lora->b->value.to_vector<double>();
  Numbers w = layer.weight->value.to_vector<double>();
  for (int64_t o = 0; o < 4; ++o)
    for (int64_t i = 0; i < 6; ++i)
      for (int64_t r = 0; r < 2; ++r) w[o * 6 + i] += 1.5 * b[o * 2 + r] * a[r * 6 + i];
  transfer(Tensor::from<double>({4, 6}, w), plain.weight->value);
  transfer(layer.bias->value, plain.bias->value);
  Param gamma;
  gamma.name = "gamma", gamma.value = normal_tensor({4}, "gamma", DType::f64);
  if (scaled) layer.scale = plain.scale = &gamma;
  const Var x(normal_tensor({2, 5, 6}, "x", DType::f64)), onto = residual ? Var(normal_tensor({2, 5, 4}, "onto", DType::f64)) : Var();
  CHECK(largest_difference(layer(x, onto).value().to_vector<double>(), plain(x, onto).value().to_vector<double>()) <= 1e-12);
}

TEST_CASE("lora: dropout is on what the factors read, and only with a tape") {
  INFO(seed_note());
  ParamStore store;
  LoraOptions options = rank_two({"fc"});
  options.dropout = 0.5;
  const Linear layer = Linear::make(build_f64(store, options), "fc", 64, 3);
  fill_normal(*layer.lora->b);
  const Var x(normal_tensor({4, 64}, "x", DType::f64));
  const Numbers evaluated = layer(x).value().to_vector<double>();
  CHECK(evaluated == layer(x).value().to_vector<double>());
  const auto under_tape = [&] {
    StoragePolicy policy = one_codec("exact");
    Tape tape(policy, 1, 2);
    return layer(x).value().to_vector<double>();
  };
  const Numbers trained = under_tape();
  CHECK(trained != evaluated);
  transfer(Tensor::zeros(layer.lora->b->value.shape(), DType::f64), layer.lora->b->value);  // the base alone drops nothing
  CHECK(under_tape() == layer(x).value().to_vector<double>());
}

TEST_CASE("lora: a frozen linear keeps nothing, its factors x and the rank's worth beside it") {
  INFO(seed_note());
  const std::string storage = GENERATE("exact", "rebuild");
  CAPTURE(storage);
  TinyVit full;
  ParamStore store;
  const Vit model(Builder(store, 11, DType::f32, DType::f32, test_device(), rank_two({"blocks.*"})), tiny_config());
  adapt(store);
  StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}});
  if (storage == "rebuild") policy = make_policy(reference_storage());
  const int64_t before = live_activations();
  Tape tape(policy, 1, 2);
  const Var loss = cross_entropy(model(full.images), full.labels);
  const auto sites = sites_of(policy);
  int64_t told = 0;
  for (const auto& [name, record] : sites) told += record.kept_bytes;
  CHECK(live_activations() - before == told);
  const int64_t x = 4 * 17 * 24 * 4;  // bytes of the tokens of 4 images
  for (const std::string linear : {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}) {
    CAPTURE(linear);
    CHECK(sites.count("blocks.1." + linear + ":x") == 0);
    const SiteRecord &a = sites.at("blocks.1." + linear + ".lora_A:x"), &b = sites.at("blocks.1." + linear + ".lora_B:x");
    CHECK(a.exact_bytes == x * (linear == "mlp.fc2" ? 4 : 1));
    CHECK(b.kept_bytes == x / 24 * 2);
    if (linear == "attn.proj")
      CHECK((a.codec == "shared" && a.kept_bytes == 0));  // attention's own o
    else
      CHECK(a.kept_bytes == (storage == "rebuild" ? 0 : a.exact_bytes));
  }
  CHECK(sites.count("head:x") == 0);
  CHECK(sites.count("patch_embed.proj:x") == 0);
  // Below the first factors nothing learns: the first norm keeps nothing, and so its output must be kept.
  CHECK(sites.count("blocks.0.norm1:xhat") == 0);
  CHECK(sites.at("blocks.0.attn.qkv.lora_A:x").kept_bytes == x);
  tape.backward(loss);
  for (const Param& param : store.params()) CHECK(param.grad_written == is_lora_factor(param.name));
}

TEST_CASE("lora: nothing is recorded below the first linear with factors") {
  TinyVit full;
  ParamStore store;
  const Vit model(Builder(store, 11, DType::f32, DType::f32, test_device(), rank_two({"blocks.2.attn.qkv"})), tiny_config());
  adapt(store);
  StoragePolicy policy = simple_policy({{"*", "exact", {}, ""}});
  Tape tape(policy);
  const Var loss = cross_entropy(model(full.images), full.labels);
  for (const SiteRecord& record : policy.sites()) CHECK_THAT(record.site.name(), !Contains("blocks.0") && !Contains("blocks.1"));
  tape.backward(loss);
  CHECK(store.at("blocks.2.attn.qkv.lora_B.weight").grad_written);
}

TEST_CASE("lora: gradients of the factors of a whole network are those that the merged weights' gradient gives") {
  INFO(seed_note());
  // With W = w + f b a: db = f dW a^T, da = f b^T dW.
  ParamStore store, plain_store;
  VitConfig config = tiny_config();
  config.depth = 1, config.layer_scale = 0.3;
  const Vit model(build_f64(store, rank_two({"*.fc2"})), config), plain(build_f64(plain_store), config);
  const Tensor images = normal_tensor({2, 3, 16, 16}, "images", DType::f64, MemoryKind::inputs);
  const Tensor labels = Tensor::from<int64_t>({2}, {1, 3}, MemoryKind::inputs);
  const auto gradients = [&](const Vit& net) {
    StoragePolicy policy = one_codec("exact");
    Tape tape(policy);
    tape.backward(cross_entropy(net(images), labels));
  };
  gradients(model), gradients(plain);  // b is 0, so that both are at the same point
  const std::string path = "blocks.0.mlp.fc2.";
  const Numbers dW = plain_store.at(path + "weight").grad.to_vector<double>(),
                a = store.at(path + "lora_A.weight").value.to_vector<double>();
  Numbers expected(24 * 2);
  for (int64_t o = 0; o < 24; ++o)
    for (int64_t r = 0; r < 2; ++r)
      for (int64_t i = 0; i < 96; ++i) expected[o * 2 + r] += 1.5 * dW[o * 96 + i] * a[r * 96 + i];
  CHECK(largest(expected) > 1e-4);
  CHECK(largest_difference(store.at(path + "lora_B.weight").grad.to_vector<double>(), expected) <= 1e-12);
  CHECK(largest(store.at(path + "lora_A.weight").grad.to_vector<double>()) == 0);
}

TEST_CASE("lora: every linear of every family can be a target") {
  const auto adapted = [](const std::string& name, std::vector<std::string> targets) {
    ParamStore store;
    const Net net(Builder(store, 0, DType::f32, DType::f32, kMeta, rank_two(std::move(targets))), net_config(name));
    std::set<std::string> weights;  // of products: two axes, and not a table of biases
    for (const Param& param : store.params())
      if (param.value.rank() == 2 && param.name.ends_with(".weight") && !is_lora_factor(param.name)) weights.insert(linear_of(param.name));
    CHECK(std::set<std::string>(store.linears().begin(), store.linears().end()) == weights);
    return adapted_linears(store);
  };
  CHECK(adapted("deit_tiny_distilled_patch16_224", {"*"}).size() == 12 * 4 + 2);
  CHECK(adapted("swin_tiny", {"*"}).size() == 12 * 4 + 3 + 1);
  CHECK(adapted("pvt_tiny", {"*"}).size() == 8 * 5 + 1);
  CHECK(adapted("resnet50", {"*"}) == std::set<std::string>{"fc"});
  CHECK(adapted("swin_tiny", {"*.reduction", "head.fc"}) == std::set<std::string>{"layers.1.downsample.reduction",
                                                                                  "layers.2.downsample.reduction",
                                                                                  "layers.3.downsample.reduction", "head.fc"});
  CHECK(adapted("pvt_tiny", {"block4.@(0|1).attn.@(q|kv)"}).size() == 4);
  CHECK(adapted("deit_tiny", {}).empty());
}

TEST_CASE("lora: names of factors and of their linears") {
  CHECK(is_lora_factor("blocks.0.attn.qkv.lora_A.weight"));
  CHECK(is_lora_factor("fc.lora_B.weight"));
  CHECK_FALSE(is_lora_factor("blocks.0.attn.qkv.weight"));
  CHECK(linear_of("blocks.0.attn.qkv.lora_B.weight") == "blocks.0.attn.qkv");
  CHECK(linear_of("head.bias") == "head");
  CHECK(linear_of("pos_embed") == "pos_embed");
  CHECK_THROWS_WITH(
      add_lora(normal_tensor({2, 3}, "y"), normal_tensor({2, 4}, "x"), normal_tensor({2, 4}, "a"), normal_tensor({3, 1}, "b"), 1),
      Contains("LoRA's factors are [2, 4] and [3, 1]"));
}
