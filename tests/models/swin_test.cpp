// Swin transformers: timm's names and sizes, configurations that cannot be, and what a policy keeps of one.
#include <catch2/catch.hpp>
#include <map>

#include "mesa/models/model.h"
#include "support/errors.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

SwinConfig config_of(const std::string& name) { return std::get<SwinConfig>(net_config(name).family); }

/// Parameters without memory.
struct Plan {
  ParamStore store;
  Swin model;
  explicit Plan(const SwinConfig& config) : model(Builder(store, 0, DType::f32, DType::f32, kMeta), config) {}
};

}  // namespace

TEST_CASE("swin: swin_tiny has timm's parameters under timm's names") {
  Plan plan(config_of("swin_tiny_patch4_window7_224"));
  std::map<std::string, Shape> expected{{"patch_embed.proj.weight", {96, 3, 4, 4}},
                                        {"patch_embed.proj.bias", {96}},
                                        {"patch_embed.norm.weight", {96}},
                                        {"patch_embed.norm.bias", {96}},
                                        {"norm.weight", {768}},
                                        {"norm.bias", {768}},
                                        {"head.fc.weight", {1000, 768}},
                                        {"head.fc.bias", {1000}}};
  const int depths[] = {2, 2, 6, 2};
  for (int i = 0; i < 4; ++i) {
    const int64_t C = 96 << i, H = 3 << i;
    const std::string layer = concat("layers.", i, ".");
    if (i > 0) {
      expected[layer + "downsample.norm.weight"] = expected[layer + "downsample.norm.bias"] = {2 * C};
      expected[layer + "downsample.reduction.weight"] = {C, 2 * C};
    }
    for (int j = 0; j < depths[i]; ++j) {
      const std::string block = concat(layer, "blocks.", j, ".");
      for (const char* norm : {"norm1", "norm2"})
        for (const char* which : {".weight", ".bias"}) expected[block + norm + which] = {C};
      expected[block + "attn.relative_position_bias_table"] = {169, H};
      expected[block + "attn.qkv.weight"] = {3 * C, C};
      expected[block + "attn.qkv.bias"] = {3 * C};
      expected[block + "attn.proj.weight"] = {C, C};
      expected[block + "attn.proj.bias"] = {C};
      expected[block + "mlp.fc1.weight"] = {4 * C, C};
      expected[block + "mlp.fc1.bias"] = {4 * C};
      expected[block + "mlp.fc2.weight"] = {C, 4 * C};
      expected[block + "mlp.fc2.bias"] = {C};
    }
  }
  std::map<std::string, Shape> found;
  for (const Param& p : plan.store.params()) {
    found[p.name] = p.value.shape();
    INFO(p.name);
    CHECK(p.decay == (p.name.ends_with(".weight") && p.value.rank() > 1));  // none on biases, norms and tables
  }
  CHECK(found == expected);
}

TEST_CASE("swin: parameter counts and operations of the published sizes") {
  struct Known {
    const char* name;
    int64_t parameters;
    double giga_products;  ///< multiply-adds, as papers count "FLOPs"
  };
  for (const Known& k : {Known{"swin_tiny", 28288354, 4.5}, Known{"swin_small", 49606258, 8.7}, Known{"swin_base", 87768224, 15.4},
                         Known{"swin_base_patch4_window12_384", 87903584, 47.0}, Known{"swin_large", 196532476, 34.5}}) {
    INFO(k.name);
    CHECK(Plan(config_of(k.name)).store.count() == k.parameters);
    CHECK(config_of(k.name).forward_flops() / 2e9 == Approx(k.giga_products).epsilon(0.012));
  }
}

TEST_CASE("swin: windows are those of the paper, and as small as the grid where that is smaller") {
  const SwinConfig config = config_of("swin_tiny");
  const auto stages = config.stages();
  REQUIRE(stages.size() == 4);
  const kernels::Windows first = stages[0].windows(7, true), last = stages[3].windows(7, true);
  CHECK(first.count() == 64);
  CHECK(first.shift_y == 3);
  CHECK(first.token(0, 0) == 3 * 56 + 3);
  CHECK(first.token(63, 48) == 2 * 56 + 2);  // around the corner
  CHECK(first.divided(63));
  CHECK_FALSE(first.divided(0));
  CHECK(first.region(63, 0) == 4);
  CHECK(first.region(63, 48) == 8);
  CHECK(last.count() == 1);
  CHECK(last.shift_y + last.shift_x == 0);
  SwinConfig small = config;
  small.image_size = 64, small.pad = true;
  const kernels::Windows padded = small.stages()[0].windows(7, true);
  CHECK(padded.height == 21);
  CHECK(padded.inner_height == 16);
  CHECK(padded.token(8, 48) == 20 * 21 + 20);  // padding stays where it is
}

TEST_CASE("swin: names that are not known, and sizes that cannot be, are refused with what would fit") {
  CHECK_THAT(error_of([] { net_config("swin_tinny"); }), Contains("did you mean 'swin_tiny'?"));
  const auto refusal = [](auto change) {
    SwinConfig config = config_of("swin_tiny");
    change(config);
    return error_of([&] { config.validate(); });
  };
  CHECK_THAT(refusal([](SwinConfig& c) { c.image_size = 256; }),
             Contains("model.image_size 256 does not divide into patches of 4 (model.patch_size), windows of 7 (model.window)") &&
                 Contains("(model.depths); 224 or 448 would"));
  CHECK_THAT(refusal([](SwinConfig& c) { c.window = 63, c.depths = {1, 1, 1, 1, 1, 1, 1, 1}; }), Contains("would"));
  CHECK_THAT(refusal([](SwinConfig& c) { c.image_size = 65536, c.patch_size = 1, c.window = 1, c.depths = {1}; }),
             Contains("too many patches"));
  CHECK_THAT(refusal([](SwinConfig& c) { c.image_size = 250, c.pad = true; }), Contains("224 or 256 would"));
  CHECK_THAT(refusal([](SwinConfig& c) { c.image_width = 16, c.pad = true; }), Contains("model.image_size 16") && Contains("32 would"));
  CHECK_THAT(refusal([](SwinConfig& c) { c.heads = 5; }), Contains("model.width 96 does not divide by model.heads 5"));
  CHECK_THAT(refusal([](SwinConfig& c) { c.depths = {}; }), Contains("model.depths has 0 stages"));
  CHECK_THAT(refusal([](SwinConfig& c) { c.depths = {2, 0}; }), Contains("model.depths is 0"));
  CHECK_THAT(refusal([](SwinConfig& c) { c.attention = AttentionKind::cudnn; }), Contains("cudnn knows no windows"));
  Plan plan(config_of("swin_tiny"));
  CHECK_THAT(error_of([&] {
               plan.model(Tensor::empty({1, 3, 8, 8}, DType::f32, kMeta));
             }),
             Contains("takes [B, 3, 224, 224], not [1, 3, 8, 8]"));
}
