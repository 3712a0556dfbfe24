// mesa-eval: how well a checkpoint does; it alone says which model and which preprocessing.
#include <omp.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "mesa/train/checkpoint.h"
#include "mesa/train/evaluate.h"
#include "mesa/train/files.h"
#include "mesa/train/version.h"

namespace {

int evaluate_checkpoint(const std::string& path, const std::string& data, int64_t batch_size, const std::vector<std::string>& overrides,
                        const std::string& json) {
  mesa::LoadedModel loaded = mesa::load_model(path);
  mesa::RunConfig& config = loaded.config;
  if (!overrides.empty()) config = mesa::parse_config(mesa::to_yaml(config), path, overrides);
  if (!data.empty()) config.data.path = data;
  if (batch_size > 0) config.train.eval_batch_size = batch_size;
  if (config.train.threads > 0) omp_set_num_threads(static_cast<int>(config.train.threads));
  const mesa::VitConfig vit = mesa::model_config(config, static_cast<int64_t>(loaded.class_names.size()));
  const mesa::TransformOptions transform = mesa::make_transform(config, vit);
  mesa::BuiltModel model(config, vit);
  mesa::load_weights(model.params, loaded.weights, path);
  const mesa::DatasetPair sets = mesa::make_datasets(config, vit);
  mesa::Loader loader(sets.test, transform, mesa::make_loader_options(config, false));
  const mesa::EvalResult result = mesa::evaluate(model.net, loader, transform);
  std::printf("top-1 %.2f %%, top-5 %.2f %%, loss %.4f, %lld images, %.1f images/s\n", result.top1, result.top5, result.loss,
              static_cast<long long>(result.images), result.images_per_second());
  if (!json.empty()) {
    const nlohmann::json out{{"checkpoint", path}, {"top1", result.top1}, {"top5", result.top5}, {"loss", result.loss},
                             {"images", result.images}, {"images_per_second", result.images_per_second()}};
    mesa::write_file_atomically(json, out.dump(2) + "\n");
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Evaluates a checkpoint: top-1, top-5, loss, images/s.", "mesa-eval");
  std::string checkpoint, data, json;
  std::vector<std::string> overrides;
  int64_t batch_size = 0;
  app.add_option("checkpoint", checkpoint, "a checkpoint's folder, a run's folder (its best), or a model.safetensors")->required();
  app.add_option("--data", data, "folder of the data (default: where the run had it)");
  app.add_option("--batch-size", batch_size, "images a batch")->check(CLI::PositiveNumber);
  app.add_option("--set", overrides, "override one key of the run's config (repeatable)")->type_name("KEY=VALUE")->expected(1)->take_all();
  app.add_option("--json", json, "also write the result to this file");
  app.set_version_flag("--version", mesa::version_text());
  app.footer("Exit codes: 0 done; 1 failed; 2 wrong usage or config.");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  try {
    return evaluate_checkpoint(checkpoint, data, batch_size, overrides, json);
  } catch (const mesa::UsageError& e) {
    std::fprintf(stderr, "mesa-eval: %s\n", e.what());
    return 2;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "mesa-eval: %s\n", e.what());
    return 1;
  }
}
