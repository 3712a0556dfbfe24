// Which model a config names.
#include <initializer_list>

#include "config_keys.h"
#include "mesa/kernels/attention.h"
#include "mesa/train/setup.h"

namespace mesa {
namespace {

/// Of the model's keys that a complaint names, one that was set, on the command line if possible: there the reader looks first.
std::string culprit(const RunConfig& config, const std::string& complaint) {
  std::string found = "model.name";
  for (const char* key : {"model.image_size", "model.patch_size", "model.window", "model.width", "model.heads", "model.depths",
                          "model.mlp_ratio", "model.attention", "model.pool", "model.distilled", "model.registers", "model.layer_scale"}) {
    if (complaint.find(key) == std::string::npos) continue;
    if (config.where(key).starts_with("--set")) return key;
    if (config.where(key) != "default") found = key;
  }
  return found;
}

void check_cudnn(const RunConfig& config) {
  const auto refuse = [&](const auto&... why) { config.refuse("model.attention", "cudnn ", why..., "; use fused"); };
  if (kernels::cudnn_attention.cuda == nullptr) refuse("is not in this build of Mesa");
  if (config.device != "cuda" && choose_device(config.device).kind != DeviceKind::cuda)
    refuse("needs a GPU, and this run is on the CPU (device: ", config.device, ")");
  if (config.train.precision != "bf16") refuse("needs train.precision: bf16, not ", config.train.precision);
}

template <class Field, class Wish>
void set(Field& field, const Wish& wish) {
  if (wish) field = *wish;
}

/// Refuses keys that are set though this family has no such thing.
void foreign(const RunConfig& config, const char* family, std::initializer_list<const char*> keys) {
  RunConfig c = config;  // the table's accessors are not const
  for (const char* key : keys)
    if (!config::write(*config::find_key(key), c).empty())
      config.refuse(key, "is nothing that a ", family, " has, and model.name is ", config.model.name);
}

/// Of a ViT and a Swin.
template <class Config>
void change_sizes(const RunConfig& config, Config& net) {
  const ModelConfig& m = config.model;
  set(net.width, m.width), set(net.heads, m.heads), set(net.mlp_ratio, m.mlp_ratio);
  net.attn_drop_rate = m.attn_drop_rate;
  net.attention = m.attention == "explicit" ? AttentionKind::explicit_
                  : m.attention == "cudnn"  ? AttentionKind::cudnn
                                            : AttentionKind::fused;
}

void change(const RunConfig& config, VitConfig& vit) {
  const ModelConfig& m = config.model;
  change_sizes(config, vit);
  foreign(config, "ViT (which has model.depth)", {"model.depths"});
  foreign(config, "ViT", {"model.window", "model.pad"});
  set(vit.depth, m.depth), set(vit.distilled, m.distilled), set(vit.registers, m.registers);
  set(vit.token_positions, m.token_positions), set(vit.layer_scale, m.layer_scale);
  if (m.pool) vit.class_token = *m.pool == "token";
}

void change(const RunConfig& config, SwinConfig& swin) {
  const ModelConfig& m = config.model;
  change_sizes(config, swin);
  foreign(config, "Swin (which has model.depths)", {"model.depth"});
  foreign(config, "Swin", {"model.distilled", "model.registers", "model.token_positions", "model.layer_scale"});
  if (m.pool && *m.pool != "mean") config.refuse("model.pool", "a Swin has no class token; it pools the mean");
  set(swin.depths, m.depths), set(swin.window, m.window), set(swin.pad, m.pad);
}

void change(const RunConfig& config, PvtConfig& pvt) {
  const ModelConfig& m = config.model;
  foreign(config, "PVT (which has model.depths)", {"model.depth"});
  foreign(config, "PVT",
          {"model.distilled", "model.registers", "model.token_positions", "model.layer_scale", "model.window", "model.pad",
           "model.mlp_ratio", "model.width", "model.heads"});
  if (m.pool && *m.pool != "token") config.refuse("model.pool", "a PVT reads its class token");
  if (m.attn_drop_rate > 0) config.refuse("model.attn_drop_rate", "dropout on attention weights is not there for a PVT");
  if (m.attention != "fused") config.refuse("model.attention", m.attention, " is not there for a PVT; use fused");
  if (!m.depths) return;
  if (m.depths->size() != pvt.stages.size())
    config.refuse("model.depths", "has ", m.depths->size(), " stages, and a PVT ", pvt.stages.size());
  for (size_t i = 0; i < pvt.stages.size(); ++i) pvt.stages[i].depth = (*m.depths)[i];
}

void change(const RunConfig& config, ResNetConfig& resnet) {
  const ModelConfig& m = config.model;
  foreign(config, "ResNet (which has model.depths)", {"model.depth"});
  foreign(config, "ResNet",
          {"model.distilled", "model.registers", "model.token_positions", "model.layer_scale", "model.window", "model.pad",
           "model.mlp_ratio", "model.heads", "model.patch_size", "model.qkv_bias"});
  if (m.pool && *m.pool != "mean") config.refuse("model.pool", "a ResNet has no class token; it pools the mean");
  if (m.attn_drop_rate > 0) config.refuse("model.attn_drop_rate", "a ResNet has no attention");
  if (m.attention != "fused") config.refuse("model.attention", m.attention, " is nothing that a ResNet has: it has no attention");
  set(resnet.width, m.width), set(resnet.depths, m.depths);
}

/// What every family has, and what all but one have.
template <class Config>
void change_common(const RunConfig& config, Config& net, int64_t classes) {
  const ModelConfig& m = config.model;
  set(net.image_size, m.image_size), set(net.channels, m.channels);
  if constexpr (requires { net.patch_size; }) set(net.patch_size, m.patch_size), set(net.qkv_bias, m.qkv_bias);
  if (m.classes)
    net.classes = *m.classes;
  else if (classes > 0)
    net.classes = classes;
  net.drop_rate = m.drop_rate, net.drop_path = m.drop_path;
}

}  // namespace

NetConfig model_config(const RunConfig& config, int64_t classes) {
  NetConfig model;
  try {
    model = net_config(config.model.name);
  } catch (const Error& e) {
    config.refuse("model.name", e.what());
  }
  std::visit([&](auto& family) { change_common(config, family, classes), change(config, family); }, model.family);
  if (config.model.attention == "cudnn") check_cudnn(config);
  if (config.model.attn_drop_rate > 0 && config.model.attention != "explicit")
    config.refuse("model.attn_drop_rate", "dropout on attention weights needs model.attention: explicit");
  try {
    model.validate();
  } catch (const Error& e) {
    config.refuse(culprit(config, e.what()), e.what());
  }
  return model;
}

}  // namespace mesa
