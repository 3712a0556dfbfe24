#include "mesa/models/vit.h"

#include "mesa/base/scope.h"

namespace mesa {

Var EncoderBlock::operator()(const Var& x) const {
  const Scope scope(name, heads);
  if (drop_path == 0 || Tape::current() == nullptr) {  // the last product of each branch adds
    const Var h = attn(norm1(x), x);
    return mlp(norm2(h), h);
  }
  const auto drop = [&](const char* which, const Var& branch) {
    const Scope scope(which);  // two streams of random numbers a block
    return mesa::drop_path(branch, drop_path);
  };
  const Var h = x + drop("drop_path1", attn(norm1(x)));
  return h + drop("drop_path2", mlp(norm2(h)));
}

void VitConfig::validate() const {
  const auto positive = [](const char* name, int64_t value) { check(value > 0, "model.", name, " is ", value, "; it must be at least 1"); };
  positive("image_size", image_size), positive("patch_size", patch_size), positive("channels", channels), positive("classes", classes);
  positive("width", width), positive("depth", depth), positive("heads", heads);
  const int64_t below = image_size / patch_size * patch_size;
  check(image_size % patch_size == 0, "model.image_size ", image_size, " does not divide into patches of ", patch_size, "; ",
        below > 0 ? concat(below, " or ") : "", below + patch_size, " would");
  check(width % heads == 0, "model.width ", width, " does not divide by model.heads ", heads);
  check(hidden() > 0, "model.mlp_ratio ", mlp_ratio, " leaves no hidden unit");
  check(drop_path >= 0 && drop_path < 1 && drop_rate >= 0 && drop_rate < 1 && attn_drop_rate >= 0 && attn_drop_rate < 1,
        "model.drop_path, drop_rate and attn_drop_rate must lie in [0, 1)");
}

double VitConfig::forward_flops() const {
  const double n = static_cast<double>(tokens()), c = static_cast<double>(width), h = static_cast<double>(hidden());
  const double patches = n - (class_token ? 1 : 0), pixels = static_cast<double>(channels * patch_size * patch_size);
  const double block = n * (4 * c * c + 2 * c * h) + 2 * n * n * c;
  return 2 * (patches * c * pixels + static_cast<double>(depth) * block + c * static_cast<double>(classes));
}

Vit::Vit(const Builder& build, const VitConfig& config) : config_(config), residual_(build.residual()) {
  config_.validate();
  const int64_t C = config_.width;
  if (config_.class_token) cls_token_ = &build.param("cls_token", {1, 1, C}, Init::normal(1e-6), false);
  pos_embed_ = &build.param("pos_embed", {1, config_.tokens(), C}, Init::truncated_normal(0.02), false);
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
        Attention::make(build, "attn", C, config_.heads, config_.attention, config_.qkv_bias, config_.drop_rate, config_.attn_drop_rate);
    block.norm2 = LayerNorm::make(build, "norm2", C);
    block.mlp = Mlp::make(build, "mlp", C, config_.hidden(), config_.drop_rate);
    blocks_.push_back(std::move(block));
  }
  norm_ = LayerNorm::make(build, config_.class_token ? "norm" : "fc_norm", C);
  head_ = Linear::make(build, "head", C, config_.classes);
  head_.out = residual_;
}

Var Vit::operator()(const Var& images) const {
  const Scope scope("", config_.heads);
  check(images.value().rank() == 4 && images.dim(1) == config_.channels && images.dim(2) == config_.image_size &&
            images.dim(3) == config_.image_size,
        "the model takes [B, ", config_.channels, ", ", config_.image_size, ", ", config_.image_size, "], not ", images.shape());
  Var x = patch_embed_(images);  // [B, N, C]
  if (cls_token_) x = prepend_token(*cls_token_, x);
  {
    const Scope scope("pos_drop");
    x = dropout(bias(x, *pos_embed_), config_.drop_rate);
  }
  for (const EncoderBlock& block : blocks_) x = block(x);
  // A layer norm works token by token, so pooling first gives the same class token and keeps one token instead of all.
  return head_(norm_(config_.class_token ? select_token(x, 0) : mean_pool(x, 0)));
}

namespace {

struct Size {
  const char* name;
  int64_t width, heads;
};
constexpr Size kSizes[] = {{"tiny", 192, 3}, {"small", 384, 6}, {"base", 768, 12}};

VitConfig sized(const Size& size, int64_t image_size) {
  VitConfig config;
  config.width = size.width;
  config.heads = size.heads;
  config.image_size = image_size;
  return config;
}

std::vector<std::pair<std::string, VitConfig>> table() {
  std::vector<std::pair<std::string, VitConfig>> all{{"vit", sized(kSizes[0], 224)}};
  for (const char* family : {"deit", "vit"})
    for (const Size& size : kSizes)
      for (int64_t image_size : {224, 384}) {
        const VitConfig config = sized(size, image_size);
        all.emplace_back(concat(family, "_", size.name, "_patch16_", image_size), config);
        if (image_size == 224) all.emplace_back(concat(family, "_", size.name), config);
      }
  return all;
}

}  // namespace

VitConfig vit_config(const std::string& name) {
  for (const auto& [known, config] : table())
    if (known == name) return config;
  const std::string near = nearest(name, model_names());
  fail("there is no model '", name, "'", near.empty() ? "" : "; did you mean '" + near + "'?");
}

std::vector<std::string> model_names() {
  std::vector<std::string> names;
  for (const auto& [name, config] : table()) names.push_back(name);
  return names;
}

}  // namespace mesa
