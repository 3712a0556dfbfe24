// Vision transformers: ViT (Dosovitskiy et al., ICLR 2021), DeiT (Touvron et al., ICML 2021), DeiT III (Touvron et al., ECCV 2022) and
// registers (Darcet et al., ICLR 2024), with timm's parameter names.
#pragma once
#include "mesa/models/input.h"
#include "mesa/nn/layers.h"

namespace mesa {

struct VitConfig : ImageConfig {
  int64_t patch_size = 16;
  int64_t width = 192, depth = 12, heads = 3;
  double mlp_ratio = 4;
  bool class_token = true;  ///< false: mean over the patch tokens, normalized after pooling (timm's global_pool='avg')
  bool distilled = false;   ///< a distillation token with a head of its own beside the class token's; logits are the mean of both
  int64_t registers = 0;    ///< tokens that nothing reads
  bool token_positions = true;  ///< false: only patches have position embeddings (DeiT III; timm's no_embed_class)
  double layer_scale = 0;   ///< first value of the factors on each branch's channels; 0: none
  bool qkv_bias = true;
  double drop_rate = 0, attn_drop_rate = 0;
  double drop_path = 0;  ///< of the last block; rises linearly from 0
  AttentionKind attention = AttentionKind::fused;

  int64_t patches() const { return (height_px() / patch_size) * (width_px() / patch_size); }
  int64_t prefix() const { return (class_token ? 1 : 0) + (distilled ? 1 : 0) + registers; }  ///< tokens in front of the patches
  int64_t tokens() const { return prefix() + patches(); }
  int64_t hidden() const { return static_cast<int64_t>(mlp_ratio * static_cast<double>(width)); }
  /// Throws Error that names the field and says what would fit.
  void validate() const;
  /// Floating-point operations (2 for a multiply-add) of one image's forward pass: products only.
  double forward_flops() const;
};

class Vit {
 public:
  /// Makes every parameter; see Builder for names, values and dtypes.
  Vit(const Builder& build, const VitConfig& config);
  /// images [B, channels, H, W] -> logits [B, classes] in the master dtype.
  Var operator()(const Var& images) const;
  /// What each head says by itself: the class token's, and of a distilled model the distillation token's.
  std::vector<Var> heads(const Var& images) const;
  const VitConfig& config() const { return config_; }

 private:
  VitConfig config_;
  DType residual_;
  /// Patches with tokens in front and positions added.
  Var embed(const Var& images) const;

  PatchEmbed patch_embed_;
  std::vector<Param*> prefix_;  ///< class, distillation and register tokens
  Param* pos_embed_ = nullptr;
  std::vector<EncoderBlock> blocks_;
  LayerNorm norm_;
  Linear head_;
  std::optional<Linear> head_dist_;
};

/// timm's names with their configurations; `vit` is DeiT-Ti to be changed by parameters.
std::vector<std::pair<std::string, VitConfig>> vit_models();

}  // namespace mesa
