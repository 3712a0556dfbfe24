#include "mesa/models/pvt.h"

#include <numeric>
#include <utility>

#include "mesa/base/scope.h"

namespace mesa {

void PvtConfig::validate() const {
  const auto positive = [](const char* name, int64_t value) { check(value > 0, "model.", name, " is ", value, "; it must be at least 1"); };
  positive("image_size", image_size), positive("patch_size", patch_size), positive("channels", channels), positive("classes", classes);
  check(!stages.empty() && stages.size() <= 8, "a PVT of ", stages.size(), " stages; there may be 1 to 8");
  int64_t unit = 1;  // pixels that a side must be a multiple of
  for (size_t i = 0; i < stages.size(); ++i) {
    const Stage& s = stages[i];
    positive("depths", s.depth);
    check(s.width > 0 && s.heads > 0 && s.width % s.heads == 0 && s.mlp_ratio * static_cast<double>(s.width) >= 1 && s.reduction > 0,
          "stage ", i + 1, " has a width of ", s.width, ", ", s.heads, " heads, an MLP ratio of ", s.mlp_ratio, " and a reduction by ",
          s.reduction);
    unit = std::lcm(unit, (patch_size << i) * s.reduction);
  }
  check(stages.back().reduction == 1, "the last stage has a class token, so that its grid cannot be reduced by ", stages.back().reduction);
  for (int64_t side : {height_px(), width_px()}) {
    const int64_t below = side / unit * unit;
    check(side % unit == 0, "model.image_size ", side, " does not divide into patches and reduced grids at every stage; ",
          below > 0 ? concat(below, " or ") : "", below + unit, " would");
  }
  check(drop_path >= 0 && drop_path < 1 && drop_rate >= 0 && drop_rate < 1, "model.drop_path and drop_rate must lie in [0, 1)");
}

double PvtConfig::forward_flops() const {
  double products = 0;
  int64_t before = channels * patch_size * patch_size;  // numbers of a patch
  for (size_t i = 0; i < stages.size(); ++i) {
    const Stage& s = stages[i];
    const bool last = i + 1 == stages.size();
    const double grid = static_cast<double>(grid_height(i) * grid_width(i)), C = static_cast<double>(s.width);
    const double N = grid + (last ? 1 : 0), M = s.reduction == 1 ? N : grid / static_cast<double>(s.reduction * s.reduction);
    products += grid * C * static_cast<double>(before);
    const double reduce = s.reduction == 1 ? 0 : grid * C * C;
    products += static_cast<double>(s.depth) * (reduce + 2 * N * C * C + 2 * M * C * C + 2 * N * M * C + 2 * s.mlp_ratio * N * C * C);
    before = 4 * s.width;
  }
  return 2 * (products + static_cast<double>(stages.back().width * classes));
}

Pvt::Pvt(const Builder& build, const PvtConfig& config) : config_(config), residual_(build.residual()) {
  config_.validate();
  int64_t all = 0, before = 0;
  for (const PvtConfig::Stage& stage : config_.stages) all += stage.depth;
  for (size_t i = 0; i < config_.stages.size(); ++i) {
    stages_.push_back(make_stage(build, i, before, all));
    before += config_.stages[i].depth;
  }
  const int64_t C = config_.stages.back().width;
  norm_ = LayerNorm::make(build, "norm", C);
  cls_token_ = &build.param("cls_token", {1, 1, C}, Init::truncated_normal(0.02), false);
  head_ = Linear::make(build, "head", C, config_.classes);
  head_.out = residual_;
}

Pvt::Stage Pvt::make_stage(const Builder& build, size_t index, int64_t blocks_before, int64_t all_blocks) {
  const PvtConfig::Stage& plan = config_.stages[index];
  const bool last = index + 1 == config_.stages.size();
  const int64_t C = plan.width, height = config_.grid_height(index), width = config_.grid_width(index);
  Stage stage;
  stage.number = std::to_string(index + 1);
  stage.heads = plan.heads;
  const std::string embed = "patch_embed" + stage.number;
  stage.patch_embed = index == 0 ? PatchEmbed::make(build, embed, config_.channels, config_.patch_size, C)
                                 : PatchEmbed::make(build, embed, config_.stages[index - 1].width, 2, C);
  {
    const Scope scope(embed);
    stage.patch_norm = LayerNorm::make(build, "norm", C, 1e-5);
    stage.patch_norm.out = residual_;
  }
  // The original decays position embeddings, too.
  stage.pos_embed = &build.param("pos_embed" + stage.number, {1, height * width + (last ? 1 : 0), C}, Init::truncated_normal(0.02), true);
  stage.pos_embed->grid = {last ? 1 : 0, height, width};
  for (int64_t i = 0; i < plan.depth; ++i) {
    Block<ReducedAttention> block;
    block.name = concat("block", stage.number, ".", i);
    block.heads = plan.heads;
    const Scope scope(block.name);
    block.drop_path = all_blocks > 1 ? config_.drop_path * static_cast<double>(blocks_before + i) / static_cast<double>(all_blocks - 1)
                                     : config_.drop_path;
    block.norm1 = LayerNorm::make(build, "norm1", C);
    block.attn = ReducedAttention::make(build, "attn", C, plan.heads, height, width, plan.reduction, config_.qkv_bias, config_.drop_rate);
    block.norm2 = LayerNorm::make(build, "norm2", C);
    block.mlp = Mlp::make(build, "mlp", C, static_cast<int64_t>(plan.mlp_ratio * static_cast<double>(C)), config_.drop_rate);
    stage.blocks.push_back(std::move(block));
  }
  return stage;
}

/// Images, or the tokens of the stage before, as tokens with positions; the last stage has a class token in front.
Var Pvt::embed(size_t index, const Var& x) const {
  const Stage& stage = stages_[index];
  const auto patches_of = [&] {
    if (index == 0) return stage.patch_embed(x);
    const Scope scope("", stages_[index - 1].heads);  // whose tokens these still are
    return stage.patch_embed(x, config_.grid_height(index - 1), config_.grid_width(index - 1));
  };
  const Var patches = patches_of();
  const auto normalized = [&] {
    const Scope scope("patch_embed" + stage.number);
    return stage.patch_norm(patches);
  };
  const bool last = index + 1 == stages_.size();
  const Var tokens = last ? prepend_tokens({*cls_token_}, normalized()) : normalized();
  const Scope scope("pos_drop" + stage.number);
  return dropout(bias(tokens, *stage.pos_embed), config_.drop_rate);
}

Var Pvt::operator()(const Var& images) const {
  config_.check_images(images.shape());
  Var x = images;
  for (size_t i = 0; i < stages_.size(); ++i) {
    const Scope scope("", stages_[i].heads);
    x = embed(i, x);
    // What works token by token, the last block behind its keys and the last norm, does so for the class token alone.
    const auto* const end = i + 1 == stages_.size() ? &stages_[i].blocks.back() : nullptr;
    for (const auto& block : stages_[i].blocks) x = block(std::move(x), &block == end ? 1 : 0);
  }
  const Scope last("", stages_.back().heads);
  return head_(norm_(select_token(x, 0)));
}

std::vector<std::pair<std::string, PvtConfig>> pvt_models() {
  struct Size {
    const char* name;
    int64_t depths[4];
  };
  std::vector<std::pair<std::string, PvtConfig>> all;
  for (const Size& size : {Size{"pvt_tiny", {2, 2, 2, 2}}, Size{"pvt_small", {3, 4, 6, 3}}, Size{"pvt_medium", {3, 4, 18, 3}},
                           Size{"pvt_large", {3, 8, 27, 3}}}) {
    PvtConfig config;
    for (size_t i = 0; i < 4; ++i) config.stages[i].depth = size.depths[i];
    all.emplace_back(size.name, config);
  }
  return all;
}

}  // namespace mesa
