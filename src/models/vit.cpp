#include "mesa/models/vit.h"

#include <utility>

#include "mesa/base/scope.h"

namespace mesa {

void VitConfig::validate() const {
  const auto positive = [](const char* name, int64_t value) { check(value > 0, "model.", name, " is ", value, "; it must be at least 1"); };
  positive("image_size", image_size), positive("patch_size", patch_size), positive("channels", channels), positive("classes", classes);
  positive("width", width), positive("depth", depth), positive("heads", heads);
  for (int64_t side : {height_px(), width_px()}) {
    const int64_t below = side / patch_size * patch_size;
    check(side % patch_size == 0, "model.image_size ", side, " does not divide into patches of ", patch_size, "; ",
          below > 0 ? concat(below, " or ") : "", below + patch_size, " would");
  }
  check(width % heads == 0, "model.width ", width, " does not divide by model.heads ", heads);
  check(registers >= 0 && registers <= 1024, "model.registers is ", registers, "; it must lie in [0, 1024]");
  check(class_token || !distilled, "model.distilled needs model.pool: token");
  check(layer_scale >= 0, "model.layer_scale is ", layer_scale, "; it must be 0 (none) or the factors' first value");
  check(hidden() > 0, "model.mlp_ratio ", mlp_ratio, " leaves no hidden unit");
  check(drop_path >= 0 && drop_path < 1 && drop_rate >= 0 && drop_rate < 1 && attn_drop_rate >= 0 && attn_drop_rate < 1,
        "model.drop_path, drop_rate and attn_drop_rate must lie in [0, 1)");
}

double VitConfig::forward_flops() const {
  const double n = static_cast<double>(tokens()), c = static_cast<double>(width), h = static_cast<double>(hidden());
  const double pixels = static_cast<double>(channels * patch_size * patch_size), heads_out = distilled ? 2 : 1;
  const double block = n * (4 * c * c + 2 * c * h) + 2 * n * n * c;
  return 2 *
         (static_cast<double>(patches()) * c * pixels + static_cast<double>(depth) * block + heads_out * c * static_cast<double>(classes));
}

Vit::Vit(const Builder& build, const VitConfig& config) : config_(config), residual_(build.residual()) {
  config_.validate();
  const int64_t C = config_.width;
  if (config_.class_token) prefix_.push_back(&build.param("cls_token", {1, 1, C}, Init::normal(1e-6), false));
  if (config_.distilled) prefix_.push_back(&build.param("dist_token", {1, 1, C}, Init::truncated_normal(0.02), false));
  if (config_.registers > 0) prefix_.push_back(&build.param("reg_token", {1, config_.registers, C}, Init::normal(1e-6), false));
  const int64_t positions = config_.token_positions ? config_.tokens() : config_.patches();
  pos_embed_ = &build.param("pos_embed", {1, positions, C}, Init::truncated_normal(0.02), false);
  const int64_t p = config_.patch_size;
  pos_embed_->grid = {config_.token_positions ? config_.prefix() : 0, config_.height_px() / p, config_.width_px() / p};
  const auto layer_scale = [&](const char* name) -> Param* {
    const Scope scope(name);
    return config_.layer_scale > 0 ? &build.param("gamma", {C}, Init::constant(config_.layer_scale), false) : nullptr;
  };
  patch_embed_ = PatchEmbed::make(build, "patch_embed", config_.channels, config_.patch_size, C);
  for (int64_t i = 0; i < config_.depth; ++i) {
    const std::string name = concat("blocks.", i);
    const Scope scope(name);
    EncoderBlock block;
    block.name = name;
    block.heads = config_.heads;
    block.drop_path =
        config_.depth > 1 ? config_.drop_path * static_cast<double>(i) / static_cast<double>(config_.depth - 1) : config_.drop_path;
    block.norm1 = LayerNorm::make(build, "norm1", C);
    block.attn =
        Attention::make(build, "attn", C, config_.heads, {config_.attention, config_.qkv_bias, config_.drop_rate, config_.attn_drop_rate});
    block.attn.proj.scale = layer_scale("ls1");
    block.norm2 = LayerNorm::make(build, "norm2", C);
    block.mlp = Mlp::make(build, "mlp", C, config_.hidden(), config_.drop_rate);
    block.mlp.fc2.scale = layer_scale("ls2");
    blocks_.push_back(std::move(block));
  }
  norm_ = LayerNorm::make(build, config_.class_token ? "norm" : "fc_norm", C);
  head_ = Linear::make(build, "head", C, config_.classes);
  head_.out = residual_;
  if (!config_.distilled) return;
  head_dist_ = Linear::make(build, "head_dist", C, config_.classes);
  head_dist_->out = residual_;
}

Var Vit::embed(const Var& images) const {
  Var x = patch_embed_(images);  // [B, N, C]
  const Scope scope("pos_drop");
  if (!config_.token_positions) x = bias(x, *pos_embed_);
  std::vector<Var> front(prefix_.size());
  for (size_t i = 0; i < front.size(); ++i) front[i] = *prefix_[i];
  if (!front.empty()) x = prepend_tokens(front, x);
  if (config_.token_positions) x = bias(x, *pos_embed_);
  return dropout(x, config_.drop_rate);
}

std::vector<Var> Vit::heads(const Var& images) const {
  const Scope scope("", config_.heads);
  config_.check_images(images.shape());
  Var x = embed(images);
  // What works token by token does so for those alone that are read: the last block behind its attention, and the last norm.
  const int64_t read = head_dist_ ? 2 : config_.class_token ? 1 : 0;
  for (const EncoderBlock& block : blocks_) x = block(std::move(x), &block == &blocks_.back() ? read : 0);
  if (head_dist_) {
    const Var both = norm_(first_tokens(x, 2));
    return {head_(select_token(both, 0)), (*head_dist_)(select_token(both, 1))};
  }
  return {head_(norm_(config_.class_token ? select_token(x, 0) : mean_pool(x, config_.prefix())))};
}

Var Vit::operator()(const Var& images) const {
  const std::vector<Var> all = heads(images);
  return all.size() == 1 ? all[0] : scale(all[0] + all[1], 0.5);
}

namespace {

struct Size {
  const char* name;
  int64_t width, heads, depth, patch;
};
constexpr Size kTiny{"tiny", 192, 3, 12, 16}, kSmall{"small", 384, 6, 12, 16}, kMedium{"medium", 512, 8, 12, 16},
    kBase{"base", 768, 12, 12, 16}, kLarge{"large", 1024, 16, 24, 16}, kHuge{"huge", 1280, 16, 32, 14};

VitConfig sized(const Size& size, int64_t image_size) {
  VitConfig config;
  config.width = size.width;
  config.heads = size.heads;
  config.depth = size.depth;
  config.patch_size = size.patch;
  config.image_size = image_size;
  return config;
}

/// timm's name.
std::string full_name(const std::string& family, const Size& size, int64_t image_size, const char* variant = "") {
  return concat(family, "_", size.name, variant, "_patch", size.patch, "_", image_size);
}

}  // namespace

std::vector<std::pair<std::string, VitConfig>> vit_models() {
  std::vector<std::pair<std::string, VitConfig>> all{{"vit", sized(kTiny, 224)}};
  for (const char* family : {"deit", "vit"})
    for (const Size& size : {kTiny, kSmall, kBase})
      for (int64_t image_size : {224, 384}) all.emplace_back(full_name(family, size, image_size), sized(size, image_size));
  for (int64_t image_size : {224, 384}) all.emplace_back(full_name("vit", kLarge, image_size), sized(kLarge, image_size));
  all.emplace_back(full_name("vit", kHuge, 224), sized(kHuge, 224));
  const auto distilled = [&](const Size& size, int64_t image_size) {
    VitConfig config = sized(size, image_size);
    config.distilled = true;
    all.emplace_back(full_name("deit", size, image_size, "_distilled"), config);
  };
  for (const Size& size : {kTiny, kSmall, kBase}) distilled(size, 224);
  distilled(kBase, 384);
  const auto deit3 = [&](const Size& size, int64_t image_size) {
    VitConfig config = sized(size, image_size);
    config.layer_scale = 1e-6;
    config.token_positions = false;
    all.emplace_back(full_name("deit3", size, image_size), config);
  };
  for (const Size& size : {kSmall, kMedium, kBase, kLarge, kHuge}) deit3(size, 224);
  for (const Size& size : {kSmall, kBase, kLarge}) deit3(size, 384);
  return all;
}

}  // namespace mesa
