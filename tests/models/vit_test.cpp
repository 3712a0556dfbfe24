// Vision transformers: timm's names and sizes, initial values, configurations that cannot be, and a training loop that takes no memory.
#include "mesa/models/model.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <set>

#include "mesa/base/scope.h"
#include "support/errors.h"
#include "support/gradcheck.h"
#include "support/tiny_vit.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

VitConfig vit_config(const std::string& name) { return std::get<VitConfig>(net_config(name).family); }

/// Parameters without memory.
struct Plan {
  ParamStore store;
  Vit model;
  explicit Plan(const VitConfig& config) : model(Builder(store, 0, DType::f32, DType::f32, kMeta), config) {}
};

}  // namespace

TEST_CASE("vit: deit_tiny has timm's parameters under timm's names") {
  Plan plan(vit_config("deit_tiny_patch16_224"));
  std::map<std::string, Shape> expected{
      {"cls_token", {1, 1, 192}},       {"pos_embed", {1, 197, 192}}, {"patch_embed.proj.weight", {192, 3, 16, 16}},
      {"patch_embed.proj.bias", {192}}, {"norm.weight", {192}},       {"norm.bias", {192}},
      {"head.weight", {1000, 192}},     {"head.bias", {1000}}};
  for (int i = 0; i < 12; ++i) {
    const std::string block = concat("blocks.", i, ".");
    for (const char* norm : {"norm1", "norm2"})
      for (const char* which : {".weight", ".bias"}) expected[block + norm + which] = {192};
    expected[block + "attn.qkv.weight"] = {576, 192};
    expected[block + "attn.qkv.bias"] = {576};
    expected[block + "attn.proj.weight"] = {192, 192};
    expected[block + "attn.proj.bias"] = {192};
    expected[block + "mlp.fc1.weight"] = {768, 192};
    expected[block + "mlp.fc1.bias"] = {768};
    expected[block + "mlp.fc2.weight"] = {192, 768};
    expected[block + "mlp.fc2.bias"] = {192};
  }
  std::map<std::string, Shape> found;
  for (const Param& p : plan.store.params()) {
    found[p.name] = p.value.shape();
    INFO(p.name);
    const bool matrix = p.name.ends_with(".weight") && p.value.rank() > 1;
    CHECK(p.decay == matrix);  // none on biases, norms, tokens and position
  }
  CHECK(found == expected);
  CHECK(plan.store.count() == 5717416);
}

TEST_CASE("vit: parameter counts and operations of the published sizes") {
  struct Known {
    const char* name;
    int64_t parameters;
    double giga_products;  ///< multiply-adds, as papers count "FLOPs"
  };
  for (const Known& k :
       {Known{"deit_tiny", 5717416, 1.26}, Known{"deit_small", 22050664, 4.61}, Known{"deit_base", 86567656, 17.58},
        Known{"vit_base_patch16_384", 86859496, 55.5}, Known{"vit_large", 304326632, 61.6}, Known{"vit_huge_patch14_224", 632045800, 167.4},
        Known{"deit_tiny_distilled_patch16_224", 5910800, 1.27}, Known{"deit_small_distilled_patch16_224", 22436432, 4.64},
        Known{"deit_base_distilled_patch16_224", 87338192, 17.68}, Known{"deit3_small_patch16_224", 22059496, 4.61},
        Known{"deit3_base_patch16_224", 86585320, 17.58}, Known{"deit3_large_patch16_224", 304374760, 61.6}}) {
    INFO(k.name);
    CHECK(Plan(vit_config(k.name)).store.count() == k.parameters);
    CHECK(vit_config(k.name).forward_flops() / 2e9 == Approx(k.giga_products).epsilon(0.01));
  }
}

TEST_CASE("vit: mean pooling has fc_norm, no class token and one position fewer") {
  VitConfig config = vit_config("deit_tiny");
  config.class_token = false;
  config.qkv_bias = false;
  Plan plan(config);
  std::set<std::string> names;
  for (const Param& p : plan.store.params()) names.insert(p.name);
  CHECK(names.count("cls_token") + names.count("norm.weight") + names.count("blocks.0.attn.qkv.bias") == 0);
  CHECK(names.count("fc_norm.weight") == 1);
  CHECK(plan.store.at("pos_embed").value.shape() == Shape{1, 196, 192});
}

TEST_CASE("vit: distillation, registers and LayerScale have timm's parameters, and positions go where they belong") {
  VitConfig config = vit_config("deit_tiny_distilled_patch16_224");
  Plan distilled(config);
  CHECK(distilled.store.at("dist_token").value.shape() == Shape{1, 1, 192});
  CHECK(distilled.store.at("pos_embed").value.shape() == Shape{1, 198, 192});
  CHECK(distilled.store.at("head_dist.weight").value.shape() == Shape{1000, 192});
  CHECK_FALSE(distilled.store.at("dist_token").decay);
  config = vit_config("deit3_small_patch16_224");
  config.registers = 4;
  Plan deit3(config);
  CHECK(deit3.store.at("reg_token").value.shape() == Shape{1, 4, 384});
  CHECK(deit3.store.at("pos_embed").value.shape() == Shape{1, 196, 384});
  CHECK(deit3.store.at("blocks.11.ls2.gamma").value.shape() == Shape{384});
  CHECK_FALSE(deit3.store.at("blocks.0.ls1.gamma").decay);
  CHECK_FALSE(deit3.store.at("reg_token").decay);
  CHECK(config.tokens() == 201);
}

TEST_CASE("vit: LayerScale keeps not a byte more") {
  const auto kept = [](double layer_scale) {
    VitConfig config = tiny_config();
    config.layer_scale = layer_scale;
    ParamStore store;
    const Vit net(Builder(store, 1), config);
    StoragePolicy policy("exact", {{"*", "exact", {}, ""}});
    Allocator& memory = Allocator::of(kCpu);
    const int64_t before = memory.use().of(MemoryKind::activations);
    Tape tape(policy);
    const Var loss = cross_entropy(net(normal_tensor({2, 3, 16, 16}, "images")), Tensor::from<int64_t>({2}, {0, 1}, MemoryKind::inputs));
    return memory.use().of(MemoryKind::activations) - before;
  };
  CHECK(kept(0) > 0);
  CHECK(kept(0) == kept(0.1));
}

TEST_CASE("vit: names that are not known, and sizes that cannot be, are refused with what would fit") {
  CHECK_THAT(error_of([] { vit_config("deit_tinny"); }), Contains("did you mean 'deit_tiny'?"));
  const auto refusal = [](auto change) {
    VitConfig config;
    change(config);
    return error_of([&] { config.validate(); });
  };
  CHECK_THAT(refusal([](VitConfig& c) { c.image_size = 225; }), Contains("225 does not divide into patches of 16; 224 or 240 would"));
  CHECK_THAT(refusal([](VitConfig& c) { c.heads = 5; }), Contains("model.width 192 does not divide by model.heads 5"));
  CHECK_THAT(refusal([](VitConfig& c) { c.depth = 0; }), Contains("model.depth is 0"));
  CHECK_THAT(refusal([](VitConfig& c) { c.drop_path = 1; }), Contains("drop_path"));
  CHECK_THAT(refusal([](VitConfig& c) { c.registers = -1; }), Contains("model.registers is -1"));
  CHECK_THAT(refusal([](VitConfig& c) { c.distilled = true, c.class_token = false; }), Contains("model.distilled needs model.pool: token"));
  const TinyVit net;
  CHECK_THAT(error_of([&] { net.model(normal_tensor({1, 3, 8, 8}, "small")); }), Contains("takes [B, 3, 16, 16], not [1, 3, 8, 8]"));
}

TEST_CASE("vit: initial values") {
  VitConfig config = tiny_config();
  config.width = 96;
  config.distilled = true;
  config.registers = 2;
  config.layer_scale = 1e-6;
  ParamStore store, again, other;
  Vit(Builder(store, 1), config), Vit(Builder(again, 1), config), Vit(Builder(other, 2), config);
  for (Param& p : store.params()) {
    INFO(p.name);
    const Numbers x = p.value.to_vector<double>();
    CHECK(again.at(p.name).value.to_vector<double>() == x);
    const double n = static_cast<double>(x.size());
    double mean = 0, square = 0;
    for (double v : x) mean += v / n, square += v * v / n;
    const auto is_normal = [&](double std) {
      CHECK(std::abs(mean) < 6 * std / std::sqrt(n));
      CHECK(std::abs(square / (std * std) - 1) < 6 * std::sqrt(2 / n));
    };
    if (p.name.starts_with("patch_embed")) {
      const double bound = 1 / std::sqrt(48.0);  // PyTorch's convolution: uniform within 1 / sqrt(channels p^2)
      CHECK(largest(x) <= bound);
      CHECK(std::abs(square / (bound * bound / 3) - 1) < 6 * std::sqrt(0.8 / n));
    } else if (p.name.ends_with(".gamma")) {
      CHECK(x == Numbers(x.size(), 1e-6F));
    } else if (p.name == "cls_token" || p.name == "reg_token") {
      is_normal(1e-6);
    } else if (p.name == "pos_embed" || p.name == "dist_token" || (p.name.ends_with("weight") && p.value.rank() == 2)) {
      is_normal(0.02);
      CHECK(other.at(p.name).value.to_vector<double>() != x);
    } else {
      CHECK(x == Numbers(x.size(), p.name.find("norm") != std::string::npos && p.name.ends_with("weight") ? 1.0 : 0.0));
    }
  }
}

TEST_CASE("vit: a site is named after the parameters beside it") {
  Plan plan(tiny_config());
  plan.store.allocate_gradients();
  StoragePolicy policy = simple_policy({{"*", "int8", {{"groups", "heads"}}, ""}});
  Tape tape(policy);
  plan.model(Tensor::empty({2, 3, 16, 16}, DType::f32, kMeta, MemoryKind::inputs));
  std::set<std::string> names;
  for (const SiteRecord& record : policy.sites()) {
    names.insert(record.site.name());
    if (record.site.path.starts_with("blocks.")) CHECK(record.site.heads == 3);
  }
  for (const char* site :
       {"patch_embed.proj:x", "blocks.0.norm1:xhat", "blocks.0.norm1:rstd", "blocks.0.attn.qkv:x", "blocks.0.attn.attention:q",
        "blocks.0.attn.attention:v", "blocks.0.attn.proj:x", "blocks.2.mlp.fc1:x", "blocks.2.mlp.act:x", "blocks.2.mlp.fc2:x", "head:x"}) {
    INFO(site);
    CHECK(names.count(site) == 1);
  }
}

TEST_CASE("vit: training takes no memory in the steady state, and learns") {
  INFO(seed_note());
  for (DType compute : {DType::f32, DType::bf16}) {
    INFO("products in " << to_string(compute));
    VitConfig config = tiny_config();
    config.drop_path = 0.1;
    ParamStore store;
    const Vit model(Builder(store, 5, compute, DType::f32, test_device()), config);
    store.allocate_gradients();
    const TinyVit data(config, 8);
    AdamW optimizer(store.params(), {});
    StoragePolicy policy = simple_policy({{"*", "exact", {}, ""},
                                          {"*:x", "int8", {{"groups", "heads"}, {"range", "running"}}, ""},
                                          {"*:xhat", "int8", {}, ""},
                                          {"*.attention:*", "int4", {}, ""},
                                          {"*.fc2:x", "rebuild", {}, ""}});
    std::vector<MemoryUse> use;
    std::vector<double> losses;
    for (int step = 0; step < 31; ++step) {
      Allocator::of(test_device()).reset_peak();
      store.clear_gradients();
      Tape tape(policy, 1, step);
      const Var loss = cross_entropy(model(data.images), data.labels);
      tape.backward(loss);
      optimizer.step(3e-3);
      losses.push_back(loss.value().to_vector<double>()[0]);
      use.push_back(Allocator::of(test_device()).use());
    }
    CHECK(use[30].system_allocations == use[3].system_allocations);
    CHECK(use[30].reserved == use[3].reserved);
    CHECK(use[30].peak == use[3].peak);
    CHECK(use[30].total == use[3].total);
    CHECK(losses[30] < 0.5 * losses[0]);
  }
}
