// Pyramid vision transformers: the original's names and sizes, and configurations that cannot be.
#include <catch2/catch.hpp>
#include <map>

#include "mesa/models/model.h"
#include "support/errors.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

PvtConfig config_of(const std::string& name) { return std::get<PvtConfig>(net_config(name).family); }

/// Parameters without memory.
struct Plan {
  ParamStore store;
  Pvt model;
  explicit Plan(const PvtConfig& config) : model(Builder(store, 0, DType::f32, DType::f32, kMeta), config) {}
};

}  // namespace

TEST_CASE("pvt: pvt_tiny has the original's parameters under its names") {
  Plan plan(config_of("pvt_tiny"));
  std::map<std::string, Shape> expected{
      {"cls_token", {1, 1, 512}}, {"norm.weight", {512}}, {"norm.bias", {512}}, {"head.weight", {1000, 512}}, {"head.bias", {1000}}};
  const int64_t widths[] = {64, 128, 320, 512}, ratios[] = {8, 8, 4, 4}, reductions[] = {8, 4, 2, 1}, tokens[] = {3136, 784, 196, 50};
  for (int i = 0; i < 4; ++i) {
    const int64_t C = widths[i], r = reductions[i], before = i ? widths[i - 1] : 3, patch = i ? 2 : 4;
    const std::string n = std::to_string(i + 1);
    expected["patch_embed" + n + ".proj.weight"] = {C, before, patch, patch};
    for (const char* name : {".proj.bias", ".norm.weight", ".norm.bias"}) expected["patch_embed" + n + name] = {C};
    expected["pos_embed" + n] = {1, tokens[i], C};
    for (int j = 0; j < 2; ++j) {
      const std::string block = concat("block", n, ".", j, ".");
      for (const char* name : {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.q.bias", "attn.proj.bias", "mlp.fc2.bias"})
        expected[block + name] = {C};
      expected[block + "attn.q.weight"] = expected[block + "attn.proj.weight"] = {C, C};
      expected[block + "attn.kv.weight"] = {2 * C, C};
      expected[block + "attn.kv.bias"] = {2 * C};
      if (r > 1) {
        expected[block + "attn.sr.weight"] = {C, C, r, r};
        for (const char* name : {"attn.sr.bias", "attn.norm.weight", "attn.norm.bias"}) expected[block + name] = {C};
      }
      expected[block + "mlp.fc1.weight"] = {ratios[i] * C, C};
      expected[block + "mlp.fc1.bias"] = {ratios[i] * C};
      expected[block + "mlp.fc2.weight"] = {C, ratios[i] * C};
    }
  }
  std::map<std::string, Shape> found;
  for (const Param& p : plan.store.params()) {
    found[p.name] = p.value.shape();
    INFO(p.name);
    CHECK(p.decay == ((p.name.ends_with(".weight") && p.value.rank() > 1) || p.name.starts_with("pos_embed")));
  }
  CHECK(found == expected);
}

TEST_CASE("pvt: parameter counts and operations of the published sizes") {
  struct Known {
    const char* name;
    double millions, giga_products;
  };
  for (const Known& k :
       {Known{"pvt_tiny", 13.2, 1.9}, Known{"pvt_small", 24.5, 3.8}, Known{"pvt_medium", 44.2, 6.7}, Known{"pvt_large", 61.4, 9.8}}) {
    INFO(k.name);
    CHECK(static_cast<double>(Plan(config_of(k.name)).store.count()) / 1e6 == Approx(k.millions).margin(0.05));
    CHECK(config_of(k.name).forward_flops() / 2e9 == Approx(k.giga_products).margin(0.06));
  }
}

TEST_CASE("pvt: sizes that cannot be are refused with what would fit") {
  const auto refusal = [](auto change) {
    PvtConfig config = config_of("pvt_tiny");
    change(config);
    return error_of([&] { config.validate(); });
  };
  CHECK_THAT(refusal([](PvtConfig& c) { c.image_size = 225; }), Contains("model.image_size 225") && Contains("224 or 256 would"));
  CHECK_THAT(refusal([](PvtConfig& c) { c.image_size = 16; }), Contains("; 32 would"));
  CHECK_THAT(refusal([](PvtConfig& c) { c.stages[1].heads = 3; }), Contains("stage 2") && Contains("3 heads"));
  CHECK_THAT(refusal([](PvtConfig& c) { c.stages[3].reduction = 2; }), Contains("class token"));
  CHECK_THAT(refusal([](PvtConfig& c) { c.stages[0].reduction = 3; }), Contains("192 or 288 would"));
  CHECK_THAT(refusal([](PvtConfig& c) { c.stages[0].mlp_ratio = 0.001; }), Contains("stage 1"));
  CHECK_THAT(refusal([](PvtConfig& c) { c.stages.clear(); }), Contains("0 stages"));
}
