// Pyramid vision transformer (Wang et al., ICCV 2021), with the original's parameter names.
#pragma once
#include <vector>

#include "mesa/models/input.h"
#include "mesa/nn/layers.h"

namespace mesa {

struct PvtConfig : ImageConfig {
  struct Stage {
    int64_t width, depth, heads;
    double mlp_ratio;
    int64_t reduction;  ///< side of the squares of tokens that share a key and a value
  };
  int64_t patch_size = 4;  ///< of the first stage; each other halves the grid
  std::vector<Stage> stages{{64, 2, 1, 8, 8}, {128, 2, 2, 8, 4}, {320, 2, 5, 4, 2}, {512, 2, 8, 4, 1}};
  bool qkv_bias = true;
  double drop_rate = 0;
  double drop_path = 0;  ///< of the last block; rises linearly from 0

  /// Tokens of a stage's grid, without the class token of the last.
  int64_t grid_height(size_t stage) const { return height_px() / patch_size >> stage; }
  int64_t grid_width(size_t stage) const { return width_px() / patch_size >> stage; }
  /// Throws Error that names the field and says what would fit.
  void validate() const;
  /// Floating-point operations (2 for a multiply-add) of one image's forward pass: products only.
  double forward_flops() const;
};

class Pvt {
 public:
  /// Makes every parameter; see Builder for names, values and dtypes.
  Pvt(const Builder& build, const PvtConfig& config);
  /// images [B, channels, H, W] -> logits [B, classes] in the master dtype.
  Var operator()(const Var& images) const;
  const PvtConfig& config() const { return config_; }

 private:
  struct Stage {
    std::string number;  ///< "1" in patch_embed1, pos_embed1, block1
    int64_t heads;
    PatchEmbed patch_embed;
    LayerNorm patch_norm;
    Param* pos_embed;
    std::vector<Block<ReducedAttention>> blocks;
  };
  Stage make_stage(const Builder& build, size_t index, int64_t blocks_before, int64_t all_blocks);
  Var embed(size_t index, const Var& x) const;

  PvtConfig config_;
  DType residual_;
  Param* cls_token_ = nullptr;
  std::vector<Stage> stages_;
  LayerNorm norm_;
  Linear head_;
};

/// The paper's models.
std::vector<std::pair<std::string, PvtConfig>> pvt_models();

}  // namespace mesa
