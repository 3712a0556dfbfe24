#include <filesystem>

#include "mesa/train/lora.h"
#include "mesa/train/optimizer_setup.h"
#include "mesa/train/plan.h"
#include "mesa/train/trainer.h"
#include "recorded_steps.h"

namespace mesa {

std::string dry_run(const RunConfig& config, int64_t fit_bytes) {
  const std::string& kind = config.data.kind;  // what opens quickly, or must be opened to know the classes
  const bool readable = (kind == "image_folder" || kind == "shards" || kind == "packed") && std::filesystem::exists(config.data.path);
  const auto data_classes = [&] { return make_datasets(config, model_config(config, 0).input(), false).test->classes(); };
  const int64_t classes = readable ? data_classes() : known_classes(config);
  const NetConfig model = model_config(config, classes);
  compute_dtype(config, config.device == "cuda" ? kCuda : choose_device(config.device));
  make_transform(config, model.input());
  make_loader_options(config, true, kCpu);
  if (config.train.cuda_graph) RecordedSteps::check(config, config.device == "cuda" || is_gpu(choose_device(config.device)));
  RunConfig resolved = config;
  if (classes > 0) resolved.model.classes = model.input().classes;
  const Plan plan = plan_run(config, model);
  BuiltModel built(config, model, kMeta);
  make_optimizer(config, built.params);
  const std::string lora = config.lora.rank > 0 ? concat("\nlora              ", describe_lora(config, built.params)) : "";
  std::string out = concat(to_yaml(resolved), lora, "\noptimizer         ", describe_optimizer(config, built.params), "\n",
                           format_plan(plan, config.train.batch_size));
  if (fit_bytes > 0) out += concat("\nlargest batch within ", format_bytes(fit_bytes), ": ", largest_batch(config, model, fit_bytes), "\n");
  return out;
}

}  // namespace mesa
