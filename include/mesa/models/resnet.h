// Residual networks (He et al., CVPR 2016) with timm's parameter names; of bottlenecks the 3 x 3 convolution has the stride ("v1.5").
#pragma once
#include <optional>
#include <vector>

#include "mesa/models/input.h"
#include "mesa/nn/conv.h"
#include "mesa/nn/layers.h"

namespace mesa {

struct ResNetConfig : ImageConfig {
  bool bottleneck = false;                  ///< blocks of 1 x 1, 3 x 3, 1 x 1 with four times the width at their end
  std::vector<int64_t> depths{2, 2, 2, 2};  ///< blocks of each stage; each but the first halves the grid and doubles the width
  int64_t width = 64;                       ///< of the stem and the first stage
  double drop_rate = 0;                     ///< in front of the classifier
  double drop_path = 0;                     ///< of the last block; rises linearly from 0

  int64_t expansion() const { return bottleneck ? 4 : 1; }
  int64_t features() const { return (width << (depths.size() - 1)) * expansion(); }
  /// Throws Error that names the field and says what would fit.
  void validate() const;
  /// Floating-point operations (2 for a multiply-add) of one image's forward pass: products only.
  double forward_flops() const;
};

class ResNet {
 public:
  /// Makes every parameter and buffer; see Builder for names, values and dtypes. The last batch norm of each branch begins with a weight
  /// of 0, so that a block begins as its shortcut (Goyal et al. 2017, section 5.1).
  ResNet(const Builder& build, const ResNetConfig& config);
  /// images [B, channels, H, W] -> logits [B, classes] in the master dtype.
  Var operator()(const Var& images) const;
  const ResNetConfig& config() const { return config_; }

 private:
  struct Block {
    std::string name;
    std::vector<Conv2d> convs;  ///< 2, or 3 of a bottleneck, each with its norm
    std::vector<BatchNorm2d> norms;
    std::optional<Conv2d> shortcut_conv;  ///< downsample.0 and downsample.1, where the shape changes
    std::optional<BatchNorm2d> shortcut_norm;
    double drop_path = 0;
    Var operator()(const Var& x) const;
  };
  Block make_block(const Builder& build, size_t stage, int64_t index, int64_t blocks_before);

  ResNetConfig config_;
  Conv2d conv1_;
  BatchNorm2d bn1_;
  kernels::ConvGeometry pool_;
  int64_t height_ = 0, width_ = 0, channels_ = 0;  // of what the next block reads, while blocks are made
  std::vector<Block> blocks_;
  Linear fc_;
};

/// timm's resnet18 to resnet152.
std::vector<std::pair<std::string, ResNetConfig>> resnet_models();

}  // namespace mesa
