#include <cstdio>

#include "mesa/train/plan.h"

namespace mesa {
namespace {

/// Bytes kept for an image by a shipped policy, in bf16.
int64_t kept_bytes(const std::string& model, const std::string& storage) {
  RunConfig config;
  config.model.name = model;
  config.data.kind = "random";
  config.device = "cpu";
  config.train.batch_size = 16;
  config.train.precision = "bf16";
  config.train.force_precision = true;  // of a plan, which computes nothing
  config.storage = load_storage(storage);
  return plan_run(config, model_config(config, 0)).activation_bytes / config.train.batch_size;
}

}  // namespace

std::string list_models() {
  char line[200];
  std::snprintf(line, sizeof line, "%-36s %12s %8s %6s %12s %12s %12s\n", "name", "parameters", "GFLOPs", "input", "kept: exact", "int8",
                "int4");
  std::string out = line;
  for (const std::string& name : model_names()) {
    if (name == "vit") continue;  // has no sizes of its own
    const NetConfig config = net_config(name);
    ParamStore params;
    const Net shape(Builder(params, 0, DType::f32, DType::f32, kMeta), config);
    std::snprintf(line, sizeof line, "%-36s %12lld %8.1f %6lld %12s %12s %12s\n", name.c_str(), static_cast<long long>(params.count()),
                  config.forward_flops() / 2e9, static_cast<long long>(config.input().image_size), format_bytes(kept_bytes(name, "exact")).c_str(),
                  format_bytes(kept_bytes(name, "int8")).c_str(), format_bytes(kept_bytes(name, "int4")).c_str());
    out += line;
  }
  return out +
         "GFLOPs: multiply-adds of the forward pass of one image; kept: activations of one training image in bf16, by storage policy\n";
}

}  // namespace mesa
