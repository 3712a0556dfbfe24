#include "mesa/models/model.h"

namespace mesa {

namespace {

using AnyNet = std::variant<Vit, Swin, Pvt, ResNet>;
AnyNet make(const Builder& build, const VitConfig& config) { return Vit(build, config); }
AnyNet make(const Builder& build, const SwinConfig& config) { return Swin(build, config); }
AnyNet make(const Builder& build, const PvtConfig& config) { return Pvt(build, config); }
AnyNet make(const Builder& build, const ResNetConfig& config) { return ResNet(build, config); }

std::vector<std::pair<std::string, NetConfig>> table() {
  std::vector<std::pair<std::string, NetConfig>> all;
  const auto add = [&](const auto& models) {
    for (const auto& [name, config] : models) all.push_back({name, {config}});
  };
  add(vit_models());
  add(swin_models());
  add(pvt_models());
  add(resnet_models());
  return all;
}

/// Short names for what is asked for most: deit_small is deit_small_patch16_224.
std::vector<std::pair<std::string, std::string>> aliases() {
  std::vector<std::pair<std::string, std::string>> all;
  for (const char* name : {"deit_tiny", "deit_small", "deit_base", "vit_tiny", "vit_small", "vit_base", "vit_large"})
    all.emplace_back(name, concat(name, "_patch16_224"));
  all.emplace_back("vit_huge", "vit_huge_patch14_224");
  for (const char* name : {"swin_tiny", "swin_small", "swin_base", "swin_large"})
    all.emplace_back(name, concat(name, "_patch4_window7_224"));
  all.emplace_back("swin", "swin_tiny_patch4_window7_224");
  return all;
}

}  // namespace

Net::Net(const Builder& build, const NetConfig& config)
    : net_(std::visit([&](const auto& family) { return make(build, family); }, config.family)) {}

bool is_of_head(const std::string& parameter) { return parameter.starts_with("head") || parameter.starts_with("fc."); }

NetConfig net_config(const std::string& name) {
  std::vector<std::string> names = model_names();
  std::string wanted = name;
  for (const auto& [alias, full] : aliases()) {
    names.push_back(alias);
    if (alias == name) wanted = full;
  }
  for (const auto& [known, config] : table())
    if (known == wanted) return config;
  const std::string near = nearest(name, names);
  fail("there is no model '", name, "'", near.empty() ? "" : "; did you mean '" + near + "'?", " (mesa-train --list-models)");
}

std::vector<std::string> model_names() {
  std::vector<std::string> names;
  for (const auto& [name, config] : table()) names.push_back(name);
  return names;
}

}  // namespace mesa
