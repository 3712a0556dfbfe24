// Any of the model families, and the table from a name to one.
#pragma once
#include <string>
#include <variant>

#include "mesa/models/pvt.h"
#include "mesa/models/resnet.h"
#include "mesa/models/swin.h"
#include "mesa/models/vit.h"

namespace mesa {

struct NetConfig {
  std::variant<VitConfig, SwinConfig, PvtConfig, ResNetConfig> family;

  const ImageConfig& input() const {
    return std::visit([](const auto& c) -> const ImageConfig& { return c; }, family);
  }
  /// Throws Error that names the field and says what would fit.
  void validate() const {
    std::visit([](const auto& c) { c.validate(); }, family);
  }
  /// Floating-point operations (2 for a multiply-add) of one image's forward pass: products only.
  double forward_flops() const {
    return std::visit([](const auto& c) { return c.forward_flops(); }, family);
  }
};

class Net {
 public:
  /// Makes every parameter; see Builder for names, values and dtypes.
  Net(const Builder& build, const NetConfig& config);
  /// images [B, channels, H, W] -> logits [B, classes] in the master dtype.
  Var operator()(const Var& images) const {
    return std::visit([&](const auto& net) { return net(images); }, net_);
  }
  /// What each head says by itself: of a distilled model the class token's and the distillation token's, of others all there is.
  std::vector<Var> heads(const Var& images) const {
    const auto of = [&](const auto& net) -> std::vector<Var> {
      if constexpr (requires { net.heads(images); })
        return net.heads(images);
      else
        return {net(images)};
    };
    return std::visit(of, net_);
  }
  const ImageConfig& input() const {
    return std::visit([](const auto& net) -> const ImageConfig& { return net.config(); }, net_);
  }

 private:
  std::variant<Vit, Swin, Pvt, ResNet> net_;
};

/// True of the parameters of a classifier, which is made anew for other classes: "head.weight", "head.fc.bias", "fc.weight".
bool is_of_head(const std::string& parameter);

/// The configuration that a name stands for (`deit_small_patch16_224`, `swin_tiny_patch4_window7_224`; `vit` is DeiT-Ti to be changed by
/// parameters, and `swin` Swin-T). Throws Error naming the nearest known name.
NetConfig net_config(const std::string& name);
/// All full names; `net_config` knows short ones, too (`deit_small`).
std::vector<std::string> model_names();

}  // namespace mesa
