#include "mesa/optim/layer_decay.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <regex>

namespace mesa {
namespace {

/// What sorts parameters into layers: part of the network, stage, block.
using Place = std::array<int64_t, 3>;
constexpr Place kStem{0, 0, 0}, kHead{2, 0, 0};
constexpr int64_t kLast = std::numeric_limits<int64_t>::max();
constexpr Place kNorm{1, kLast, kLast};  // no layer of its own: it goes with what comes before it

int64_t number(const std::ssub_match& text) { return text.matched && text.length() > 0 ? std::stoll(text.str()) : 0; }

Place place_of(const std::string& name) {
  // Blocks of a ViT, of a Swin, and of a PVT or a ResNet; what stands in front of the blocks of a Swin's or PVT's stage.
  static const std::regex vit(R"(blocks\.(\d+)\..*)"), swin(R"(layers\.(\d+)\.blocks\.(\d+)\..*)"),
      staged(R"((?:block|layer)(\d+)\.(\d+)\..*)"), merging(R"(layers\.(\d+)\.downsample\..*)"),
      embedding(R"((?:patch_embed|pos_embed)(\d+)(?:\..*)?)"),
      stem(R"((?:cls_token|dist_token|reg_token|pos_embed|patch_embed|conv1|bn1)(?:\..*)?)"), norm(R"(norm\..*)");
  std::smatch m;
  if (std::regex_match(name, m, vit)) return {1, 0, number(m[1])};
  if (std::regex_match(name, m, swin) || std::regex_match(name, m, staged)) return {1, number(m[1]), number(m[2])};
  if (std::regex_match(name, m, merging)) return {1, number(m[1]), 0};
  if (std::regex_match(name, m, embedding)) return number(m[1]) <= 1 ? kStem : Place{1, number(m[1]), 0};
  if (std::regex_match(name, stem)) return kStem;
  return std::regex_match(name, norm) ? kNorm : kHead;
}

}  // namespace

std::vector<int64_t> layer_ids(const std::vector<std::string>& names) {
  std::map<Place, int64_t> ids;
  for (const std::string& name : names) ids[place_of(name)] = 0;
  int64_t id = -1;
  for (auto& [place, layer] : ids) {
    if (id < 0 || place != kNorm) ++id;
    layer = id;
  }
  std::vector<int64_t> out;
  for (const std::string& name : names) out.push_back(ids.at(place_of(name)));
  return out;
}

void set_layer_decay(std::deque<Param>& params, double decay) {
  std::vector<std::string> names;
  for (const Param& param : params) names.push_back(param.name);
  const std::vector<int64_t> ids = layer_ids(names);
  const int64_t last = ids.empty() ? 0 : *std::max_element(ids.begin(), ids.end());
  size_t i = 0;
  for (Param& param : params) param.lr_scale = std::pow(decay, static_cast<double>(last - ids[i++]));
}

}  // namespace mesa
