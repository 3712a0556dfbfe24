#include "mesa/models/resnet.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "mesa/base/scope.h"

namespace mesa {
namespace {

/// A square kernel with as much padding as keeps the grid at stride 1.
kernels::ConvGeometry sliding(int64_t height, int64_t width, int64_t kernel, int64_t stride) {
  return {height, width, kernel, kernel, stride, kernel / 2};
}

double products(const kernels::ConvGeometry& g, int64_t in, int64_t out) {
  return static_cast<double>(g.out_height() * g.out_width() * g.taps() * in * out);
}

/// The convolutions of one block, without the shortcut's: from `in` to `width` and, of a bottleneck, to four times that.
struct Step {
  kernels::ConvGeometry geometry;
  int64_t in, out;
};
std::vector<Step> steps_of(const ResNetConfig& config, size_t stage, int64_t index, int64_t height, int64_t width, int64_t in) {
  const int64_t channels = config.width << stage, stride = stage > 0 && index == 0 ? 2 : 1;
  const kernels::ConvGeometry strided = sliding(height, width, 3, stride);
  const int64_t to_height = strided.out_height(), to_width = strided.out_width();
  if (!config.bottleneck) return {{strided, in, channels}, {sliding(to_height, to_width, 3, 1), channels, channels}};
  return {{sliding(height, width, 1, 1), in, channels},
          {strided, channels, channels},
          {sliding(to_height, to_width, 1, 1), channels, channels * config.expansion()}};
}

/// Whether a block's shortcut needs a convolution, and which.
std::optional<kernels::ConvGeometry> shortcut_of(const std::vector<Step>& steps, int64_t height, int64_t width) {
  const kernels::ConvGeometry& last = steps.back().geometry;
  const bool same = last.out_height() == height && last.out_width() == width && steps.front().in == steps.back().out;
  const int64_t stride = std::max(steps[0].geometry.stride, steps[1].geometry.stride);
  if (same && stride == 1) return {};
  return kernels::ConvGeometry{height, width, 1, 1, stride};
}

/// With the first values of PyTorch's nn.Linear, as timm leaves it.
Linear make_classifier(const Builder& build, const std::string& name, int64_t in, int64_t out) {
  const Init init = Init::uniform(1 / std::sqrt(static_cast<double>(in)));
  Linear layer = Linear::make(build, name, in, out, true, {init, init});
  layer.out = build.residual();
  return layer;
}

template <class F>
Var within(const std::string& name, const F& f) {
  const Scope scope(name);
  return f();
}

}  // namespace

void ResNetConfig::validate() const {
  const auto positive = [](const char* name, int64_t value) { check(value > 0, "model.", name, " is ", value, "; it must be at least 1"); };
  positive("image_size", height_px()), positive("image_size", width_px()), positive("channels", channels), positive("classes", classes);
  positive("width", width);
  check(!depths.empty() && depths.size() <= 8, "model.depths has ", depths.size(), " stages; there may be 1 to 8");
  for (int64_t depth : depths) positive("depths", depth);
  check(drop_path >= 0 && drop_path < 1 && drop_rate >= 0 && drop_rate < 1, "model.drop_path and drop_rate must lie in [0, 1)");
}

double ResNetConfig::forward_flops() const {
  const kernels::ConvGeometry stem = sliding(height_px(), width_px(), 7, 2), pool = sliding(stem.out_height(), stem.out_width(), 3, 2);
  double all = products(stem, channels, width);
  int64_t height = pool.out_height(), across = pool.out_width(), in = width;
  for (size_t stage = 0; stage < depths.size(); ++stage)
    for (int64_t index = 0; index < depths[stage]; ++index) {
      const std::vector<Step> steps = steps_of(*this, stage, index, height, across, in);
      for (const Step& s : steps) all += products(s.geometry, s.in, s.out);
      if (const auto shortcut = shortcut_of(steps, height, across)) all += products(*shortcut, in, steps.back().out);
      height = steps.back().geometry.out_height(), across = steps.back().geometry.out_width(), in = steps.back().out;
    }
  return 2 * (all + static_cast<double>(in * classes));
}

ResNet::ResNet(const Builder& build, const ResNetConfig& config) : config_(config) {
  config_.validate();
  const kernels::ConvGeometry stem = sliding(config_.height_px(), config_.width_px(), 7, 2);
  conv1_ = Conv2d::make(build, "conv1", config_.channels, config_.width, stem);
  bn1_ = BatchNorm2d::make(build, "bn1", config_.width);
  pool_ = sliding(stem.out_height(), stem.out_width(), 3, 2);
  height_ = pool_.out_height(), width_ = pool_.out_width(), channels_ = config_.width;
  for (size_t stage = 0; stage < config_.depths.size(); ++stage)
    for (int64_t i = 0; i < config_.depths[stage]; ++i)
      blocks_.push_back(make_block(build, stage, i, static_cast<int64_t>(blocks_.size())));
  fc_ = make_classifier(build, "fc", channels_, config_.classes);
}

ResNet::Block ResNet::make_block(const Builder& build, size_t stage, int64_t index, int64_t blocks_before) {
  Block block;
  block.name = concat("layer", stage + 1, ".", index);
  const Scope scope(block.name);
  const int64_t all = std::accumulate(config_.depths.begin(), config_.depths.end(), int64_t{0});
  block.drop_path = all > 1 ? config_.drop_path * static_cast<double>(blocks_before) / static_cast<double>(all - 1) : config_.drop_path;
  const std::vector<Step> steps = steps_of(config_, stage, index, height_, width_, channels_);
  for (size_t i = 0; i < steps.size(); ++i) {
    const std::string number = std::to_string(i + 1);
    block.convs.push_back(Conv2d::make(build, "conv" + number, steps[i].in, steps[i].out, steps[i].geometry));
    block.norms.push_back(BatchNorm2d::make(build, "bn" + number, steps[i].out, i + 1 == steps.size() ? 0 : 1));
  }
  if (const auto shortcut = shortcut_of(steps, height_, width_)) {
    block.shortcut_conv = Conv2d::make(build, "downsample.0", channels_, steps.back().out, *shortcut);
    block.shortcut_norm = BatchNorm2d::make(build, "downsample.1", steps.back().out);
  }
  height_ = steps.back().geometry.out_height(), width_ = steps.back().geometry.out_width(), channels_ = steps.back().out;
  return block;
}

Var ResNet::Block::operator()(const Var& x) const {
  const Scope scope(name);
  Var branch = x;
  for (size_t i = 0; i < convs.size(); ++i) {
    branch = norms[i](convs[i](branch));
    if (i + 1 < convs.size()) branch = within(concat("act", i + 1), [&] { return relu(branch); });
  }
  const Var shortcut = shortcut_conv ? (*shortcut_norm)((*shortcut_conv)(x)) : x;
  const std::string act = concat("act", convs.size());
  if (drop_path == 0) return within(act, [&] { return relu(branch + shortcut); });
  const Var sum = within("drop_path", [&] { return add_drop_path(shortcut, branch, drop_path); });
  return within(act, [&] { return relu(sum); });
}

Var ResNet::operator()(const Var& images) const {
  config_.check_images(images.shape());
  Var x = bn1_(conv1_(images));
  x = within("act1", [&] { return relu(x); });
  x = within("maxpool", [&] { return max_pool2d(x, pool_); });
  for (const Block& block : blocks_) x = block(x);
  return fc_(within("drop", [&] { return dropout(mean_pool(x, 0), config_.drop_rate); }));
}

std::vector<std::pair<std::string, ResNetConfig>> resnet_models() {
  struct Size {
    const char* name;
    bool bottleneck;
    std::vector<int64_t> depths;
  };
  std::vector<std::pair<std::string, ResNetConfig>> all;
  for (const Size& size :
       {Size{"resnet18", false, {2, 2, 2, 2}}, Size{"resnet34", false, {3, 4, 6, 3}}, Size{"resnet50", true, {3, 4, 6, 3}},
        Size{"resnet101", true, {3, 4, 23, 3}}, Size{"resnet152", true, {3, 8, 36, 3}}}) {
    ResNetConfig config;
    config.bottleneck = size.bottleneck, config.depths = size.depths;
    all.emplace_back(size.name, config);
  }
  return all;
}

}  // namespace mesa
