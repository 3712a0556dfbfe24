#include "mesa/models/swin.h"

#include <algorithm>
#include <utility>

#include "mesa/base/scope.h"

namespace mesa {
namespace {

constexpr double kEps = 1e-5;  // of the original's norms

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace

kernels::Windows SwinConfig::Stage::windows(int64_t side, bool shifted) const {
  const auto fit = [&](int64_t extent) { return std::min(extent, side); };
  const auto shift = [&](int64_t extent) { return shifted && extent > side ? static_cast<int>(side / 2) : 0; };
  kernels::Windows w;
  w.window_height = static_cast<int>(fit(height)), w.window_width = static_cast<int>(fit(width));
  w.height = static_cast<int>(round_up(height, w.window_height)), w.width = static_cast<int>(round_up(width, w.window_width));
  w.shift_y = shift(height), w.shift_x = shift(width);
  w.inner_height = static_cast<int>(height), w.inner_width = static_cast<int>(width);
  return w;
}

std::vector<SwinConfig::Stage> SwinConfig::stages() const {
  std::vector<Stage> all;
  Stage stage{height_px() / patch_size, width_px() / patch_size, width, heads, 0, 0};
  for (int64_t depth : depths) {
    stage.depth = depth;
    stage.hidden = static_cast<int64_t>(mlp_ratio * static_cast<double>(stage.channels));
    all.push_back(stage);
    stage = {stage.height / 2, stage.width / 2, 2 * stage.channels, 2 * stage.heads, 0, 0};
  }
  return all;
}

namespace {

/// True if a side of so many pixels divides into patches, every stage's grid into windows (or may be padded), and all but the last into
/// pairs.
bool fits(const SwinConfig& c, int64_t side) {
  const int64_t smallest = c.patch_size << (c.depths.size() - 1);
  if (side < smallest || side % smallest != 0) return false;
  int64_t extent = side / c.patch_size;
  for (size_t i = 0; i < c.depths.size(); ++i, extent /= 2)
    if (!c.pad && extent > c.window && extent % c.window != 0) return false;
  return true;
}

/// "192 or 224": the nearest sides that fit.
std::string fitting_sides(const SwinConfig& c, int64_t side) {
  int64_t below = side - 1, above = side + 1;
  while (below > 0 && !fits(c, below)) --below;
  while (above < 16 * side + 4096 && !fits(c, above)) ++above;
  const std::string low = below > 0 ? std::to_string(below) : "", high = fits(c, above) ? std::to_string(above) : "";
  if (low.empty() && high.empty()) return "no size near it";
  return low.empty() || high.empty() ? low + high : low + " or " + high;
}

}  // namespace

void SwinConfig::validate() const {
  const auto positive = [](const char* name, int64_t value) { check(value > 0, "model.", name, " is ", value, "; it must be at least 1"); };
  positive("image_size", image_size), positive("patch_size", patch_size), positive("channels", channels), positive("classes", classes);
  positive("width", width), positive("heads", heads), positive("window", window);
  check(!depths.empty() && depths.size() <= 8, "model.depths has ", depths.size(), " stages; there may be 1 to 8");
  for (int64_t depth : depths) positive("depths", depth);
  check(width % heads == 0, "model.width ", width, " does not divide by model.heads ", heads);
  check(mlp_ratio * static_cast<double>(width) >= 1, "model.mlp_ratio ", mlp_ratio, " leaves no hidden unit");
  check(drop_path >= 0 && drop_path < 1 && drop_rate >= 0 && drop_rate < 1 && attn_drop_rate >= 0 && attn_drop_rate < 1,
        "model.drop_path, drop_rate and attn_drop_rate must lie in [0, 1)");
  check(attention != AttentionKind::cudnn, "model.attention: cudnn knows no windows; use fused");
  check(height_px() / patch_size * (width_px() / patch_size) < int64_t{1} << 31, "model.image_size ", image_size,
        " has too many patches of ", patch_size, " (model.patch_size)");
  for (int64_t side : {height_px(), width_px()})
    check(fits(*this, side), "model.image_size ", side, " does not divide into patches of ", patch_size, " (model.patch_size), ",
          pad ? "" : concat("windows of ", window, " (model.window), "), "and pairs of tokens between all ", depths.size(),
          " stages (model.depths); ", fitting_sides(*this, side), " would", pad ? "" : ", and more sizes with model.pad: true");
}

double SwinConfig::forward_flops() const {
  const auto at = [](auto... x) { return (static_cast<double>(x) * ... * 1.0); };
  double products = 0;
  const std::vector<Stage> all = stages();
  for (size_t i = 0; i < all.size(); ++i) {
    const Stage& s = all[i];
    const double tokens = at(s.height, s.width);
    if (i == 0)
      products += at(tokens, channels, patch_size, patch_size, s.channels);
    else
      products += at(tokens, 2 * s.channels, s.channels);
    const kernels::Windows w = s.windows(window, false);
    products += at(s.depth) *
                (at(tokens, s.channels) * at(s.channels + 2 * s.hidden) + at(w.tokens(), s.channels) * at(3 * s.channels + 2 * w.length()));
  }
  return 2 * (products + at(all.back().channels, classes));
}

Swin::Swin(const Builder& build, const SwinConfig& config) : config_(config), residual_(build.residual()) {
  config_.validate();
  const std::vector<SwinConfig::Stage> plans = config_.stages();
  patch_embed_ = PatchEmbed::make(build, "patch_embed", config_.channels, config_.patch_size, config_.width);
  {
    const Scope scope("patch_embed");
    patch_norm_ = LayerNorm::make(build, "norm", config_.width, kEps);
    patch_norm_.out = residual_;
  }
  for (size_t i = 0; i < plans.size(); ++i) stages_.push_back(make_stage(build, i, plans));
  norm_ = LayerNorm::make(build, "norm", plans.back().channels, kEps);
  const Scope scope("head");
  head_ = Linear::make(build, "fc", plans.back().channels, config_.classes);
  head_.out = residual_;
}

Swin::Stage Swin::make_stage(const Builder& build, size_t index, const std::vector<SwinConfig::Stage>& plans) const {
  const SwinConfig::Stage& plan = plans[index];
  Stage stage{concat("layers.", index), plan.heads, 0, 0, {}, {}, {}};
  const Scope scope(stage.name);
  int64_t before = 0, blocks = 0;
  for (size_t i = 0; i < plans.size(); ++i) blocks += plans[i].depth, before += i < index ? plans[i].depth : 0;
  if (index > 0) {
    const Scope scope("downsample");
    stage.height = plans[index - 1].height, stage.width = plans[index - 1].width;
    stage.norm = LayerNorm::make(build, "norm", 4 * plans[index - 1].channels, kEps);
    stage.reduction = Linear::make(build, "reduction", 4 * plans[index - 1].channels, plan.channels, false);
    stage.reduction.out = residual_;
  }
  const AttentionOptions options{config_.attention, config_.qkv_bias, config_.drop_rate, config_.attn_drop_rate};
  for (int64_t i = 0; i < plan.depth; ++i) {
    EncoderBlock block;
    block.name = concat("blocks.", i);
    block.heads = plan.heads;
    const Scope scope(block.name);
    block.drop_path =
        blocks > 1 ? config_.drop_path * static_cast<double>(before + i) / static_cast<double>(blocks - 1) : config_.drop_path;
    block.norm1 = LayerNorm::make(build, "norm1", plan.channels, kEps);
    block.attn = Attention::make(build, "attn", plan.channels, plan.heads, options, plan.windows(config_.window, i % 2 == 1));
    block.norm2 = LayerNorm::make(build, "norm2", plan.channels, kEps);
    block.mlp = Mlp::make(build, "mlp", plan.channels, plan.hidden, config_.drop_rate);
    stage.blocks.push_back(std::move(block));
  }
  return stage;
}

/// Four neighbours become one token of twice the width.
Var Swin::downsample(const Stage& stage, const Var& x) const {
  const Scope scope("downsample");
  return stage.reduction(stage.norm(merge_patches(x, stage.height, stage.width)));
}

Var Swin::operator()(const Var& images) const {
  const Scope scope("", config_.heads);
  config_.check_images(images.shape());
  Var x = patch_embed_(images);  // [B, N, C]
  {
    const Scope scope("patch_embed");
    x = patch_norm_(x);
  }
  {
    const Scope scope("pos_drop");
    x = dropout(x, config_.drop_rate);
  }
  for (const Stage& stage : stages_) {
    const Scope scope(stage.name, stage.heads);
    if (stage.height > 0) x = downsample(stage, x);
    for (const EncoderBlock& block : stage.blocks) x = block(std::move(x));
  }
  const Scope last("", stages_.back().heads);
  const Var pooled = mean_pool(norm_(x), 0);
  const Scope head("head");
  return head_(pooled);
}

std::vector<std::pair<std::string, SwinConfig>> swin_models() {
  struct Size {
    const char* name;
    int64_t width, heads, third;  // blocks of the third stage
  };
  std::vector<std::pair<std::string, SwinConfig>> all;
  for (const Size& size : {Size{"tiny", 96, 3, 6}, Size{"small", 96, 3, 18}, Size{"base", 128, 4, 18}, Size{"large", 192, 6, 18}})
    for (const auto& [window, image_size] : {std::pair<int64_t, int64_t>{7, 224}, {12, 384}}) {
      SwinConfig config;
      config.width = size.width;
      config.heads = size.heads;
      config.depths = {2, 2, size.third, 2};
      config.window = window;
      config.image_size = image_size;
      all.emplace_back(concat("swin_", size.name, "_patch4_window", window, "_", image_size), config);
    }
  return all;
}

}  // namespace mesa
