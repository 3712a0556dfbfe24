// Layers by name. The numbers for ViT, Swin and ResNet names are those of timm 0.9.16's group_parameters with its models' group_matcher.
#include "mesa/optim/layer_decay.h"

#include <catch2/catch.hpp>
#include <cmath>

#include "mesa/models/model.h"

using namespace mesa;

namespace {

using Ids = std::vector<int64_t>;

std::map<std::string, int64_t> layers_of(const std::string& model) {
  ParamStore store;
  NetConfig config = net_config(model);
  const Net net(Builder(store, 0, DType::f32, DType::f32, kMeta), config);
  std::vector<std::string> names;
  for (const Param& p : store.params()) names.push_back(p.name);
  const Ids ids = layer_ids(names);
  std::map<std::string, int64_t> out;
  for (size_t i = 0; i < names.size(); ++i) out[names[i]] = ids[i];
  return out;
}

}  // namespace

TEST_CASE("layer decay: the layers are timm's") {
  CHECK(layer_ids({"cls_token", "dist_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.2.mlp.fc1.bias",
                   "blocks.10.attn.qkv.weight", "norm.weight", "head.bias", "head_dist.weight"}) == Ids{0, 0, 0, 0, 1, 2, 3, 3, 4, 4});
  CHECK(layer_ids({"pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.1.norm1.weight", "fc_norm.weight",
                   "head.bias"}) == Ids{0, 0, 1, 2, 3, 3});
  CHECK(layer_ids({"patch_embed.proj.weight", "patch_embed.norm.bias", "layers.0.blocks.0.norm1.weight",
                   "layers.0.blocks.1.attn.relative_position_bias_table", "layers.1.downsample.norm.weight",
                   "layers.1.downsample.reduction.weight", "layers.1.blocks.0.attn.qkv.weight", "layers.1.blocks.1.mlp.fc2.bias",
                   "layers.2.downsample.norm.weight", "layers.2.blocks.0.attn.qkv.weight", "norm.weight", "head.fc.weight"}) ==
        Ids{0, 0, 1, 2, 3, 3, 3, 4, 5, 5, 5, 6});
  CHECK(layer_ids({"conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer1.1.bn2.bias", "layer2.0.downsample.0.weight",
                   "layer2.1.conv1.weight", "fc.weight"}) == Ids{0, 0, 1, 2, 3, 4, 5});
  CHECK(layer_ids({}).empty());
}

TEST_CASE("layer decay: every family has embeddings at 0, its blocks in order and the head last") {
  auto vit = layers_of("deit_tiny_distilled_patch16_224");
  CHECK(vit.at("blocks.11.mlp.fc2.weight") == 12);
  CHECK(vit.at("norm.weight") == 12);
  CHECK(vit.at("head_dist.bias") == 13);
  CHECK(vit.at("dist_token") == 0);
  auto swin = layers_of("swin_tiny_patch4_window7_224");
  CHECK(swin.at("patch_embed.norm.weight") == 0);
  CHECK(swin.at("layers.2.downsample.reduction.weight") == 5);
  CHECK(swin.at("layers.2.blocks.5.attn.qkv.weight") == 10);
  CHECK(swin.at("layers.3.blocks.1.mlp.fc1.bias") == 12);
  CHECK(swin.at("head.fc.weight") == 13);
  auto pvt = layers_of("pvt_tiny");
  CHECK(pvt.at("patch_embed1.proj.weight") == 0);
  CHECK(pvt.at("pos_embed1") == 0);
  CHECK(pvt.at("cls_token") == 0);
  CHECK(pvt.at("block1.1.attn.q.weight") == 2);
  CHECK(pvt.at("patch_embed2.norm.weight") == 3);
  CHECK(pvt.at("pos_embed2") == 3);
  CHECK(pvt.at("block4.1.mlp.fc2.weight") == 8);
  CHECK(pvt.at("norm.bias") == 8);
  CHECK(pvt.at("head.weight") == 9);
}

TEST_CASE("layer decay: factors are powers of it, 1 at the head") {
  ParamStore store;
  const Net net(Builder(store, 0, DType::f32, DType::f32, kMeta), net_config("deit_tiny"));
  set_layer_decay(store.params(), 0.75);
  CHECK(store.at("head.weight").lr_scale == 1);
  CHECK(store.at("blocks.11.norm1.weight").lr_scale == Approx(0.75));
  CHECK(store.at("blocks.0.norm1.weight").lr_scale == Approx(std::pow(0.75, 12)));
  CHECK(store.at("pos_embed").lr_scale == Approx(std::pow(0.75, 13)));
  set_layer_decay(store.params(), 1);
  for (const Param& p : store.params()) CHECK(p.lr_scale == 1);
}
