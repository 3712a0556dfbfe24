// Swin transformer (Liu et al., ICCV 2021), with timm's parameter names.
#pragma once
#include <vector>

#include "mesa/models/input.h"
#include "mesa/nn/layers.h"

namespace mesa {

struct SwinConfig : ImageConfig {
  int64_t patch_size = 4;
  int64_t width = 96;  ///< of the first stage; doubles at each
  std::vector<int64_t> depths{2, 2, 6, 2};
  int64_t heads = 3;   ///< of the first stage; doubles at each
  int64_t window = 7;  ///< side in tokens; a smaller grid is one window. Every second block shifts by half of it
  bool pad = false;    ///< grids that windows do not tile are padded with zeros, in place of being refused
  double mlp_ratio = 4;
  bool qkv_bias = true;
  double drop_rate = 0, attn_drop_rate = 0;
  double drop_path = 0;  ///< of the last block; rises linearly from 0
  AttentionKind attention = AttentionKind::fused;

  struct Stage {
    int64_t height, width;  ///< of the grid, in tokens
    int64_t channels, heads, depth;
    int64_t hidden;  ///< of the MLP
    /// Of every second block if `shifted`.
    kernels::Windows windows(int64_t side, bool shifted) const;
  };
  std::vector<Stage> stages() const;
  /// Throws Error that names the field and says what would fit.
  void validate() const;
  /// Floating-point operations (2 for a multiply-add) of one image's forward pass: products only.
  double forward_flops() const;
};

class Swin {
 public:
  /// Makes every parameter; see Builder for names, values and dtypes.
  Swin(const Builder& build, const SwinConfig& config);
  /// images [B, channels, H, W] -> logits [B, classes] in the master dtype.
  Var operator()(const Var& images) const;
  const SwinConfig& config() const { return config_; }

 private:
  struct Stage {
    std::string name;
    int64_t heads;
    int64_t height, width;  ///< of the grid before merging, 0 where nothing is merged
    LayerNorm norm;         ///< of merged patches
    Linear reduction;
    std::vector<EncoderBlock> blocks;
  };
  Stage make_stage(const Builder& build, size_t index, const std::vector<SwinConfig::Stage>& plans) const;
  Var downsample(const Stage& stage, const Var& x) const;

  SwinConfig config_;
  DType residual_;
  PatchEmbed patch_embed_;
  LayerNorm patch_norm_;
  std::vector<Stage> stages_;
  LayerNorm norm_;
  Linear head_;
};

/// timm's names with their configurations.
std::vector<std::pair<std::string, SwinConfig>> swin_models();

}  // namespace mesa
