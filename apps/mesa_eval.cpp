// mesa-eval: how well a checkpoint does; it alone says which model and which preprocessing.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>

#include "app.h"
#include "mesa/train/checkpoint.h"
#include "mesa/train/evaluate.h"
#include "mesa/train/files.h"

namespace {

/// "0", "1", ...: what a data set without names calls its classes.
bool are_numbers(const std::vector<std::string>& names) {
  for (size_t i = 0; i < names.size(); ++i)
    if (names[i] != std::to_string(i)) return false;
  return true;
}

/// Labels are numbers in the order of the class names: other names would give a wrong result, not an error.
void check_classes(const std::vector<std::string>& trained, const std::vector<std::string>& data, const std::string& checkpoint) {
  if (trained.size() == data.size() && (are_numbers(trained) || are_numbers(data))) return;
  for (size_t i = 0; i < std::max(trained.size(), data.size()); ++i) {
    const std::string then = i < trained.size() ? "'" + trained[i] + "'" : "missing", now = i < data.size() ? "'" + data[i] + "'" : "missing";
    if (then == now) continue;
    throw mesa::Error(mesa::concat(checkpoint, ": the classes of these data are not those of its training: class ", i, " was ", then,
                                   " and is ", now));
  }
}

mesa::WeightsKind kind_of(const std::string& wish) {
  return wish == "ema" ? mesa::WeightsKind::ema : wish == "raw" ? mesa::WeightsKind::raw : mesa::WeightsKind::automatic;
}

/// The live line, on a terminal only.
void show(int64_t done, int64_t total) {
  static auto drawn = std::chrono::steady_clock::time_point();
  const auto now = std::chrono::steady_clock::now();
  if (isatty(2) != 1 || (done < total && now - drawn < std::chrono::milliseconds(200))) return;
  drawn = now;
  std::fprintf(stderr, done < total ? "\r%lld of %lld images" : "\r\x1b[K", static_cast<long long>(done), static_cast<long long>(total));
}

int evaluate_checkpoint(const std::string& path, mesa::WeightsKind weights, const std::string& data, int64_t batch_size,
                        const std::vector<std::string>& overrides, const std::string& device, const std::string& json) {
  if (!json.empty()) mesa::check_can_write(json);
  mesa::LoadedModel loaded = mesa::load_model(path, weights);
  mesa::RunConfig& config = loaded.config;
  if (!overrides.empty()) config = mesa::parse_config(mesa::to_yaml(config), path, overrides);
  if (!data.empty() && (config.data.kind == "shapes" || config.data.kind == "random"))
    throw mesa::UsageError(mesa::concat("--data: the run's data are generated (data.kind: ", config.data.kind, "), they have no folder"));
  if (!data.empty()) config.data.path = data;
  if (batch_size > 0) config.train.eval_batch_size = batch_size;
  // The weights do not say where to compute: what only a GPU or another CPU has is replaced by its equal.
  config.device = device;
  config.train.force_precision = true;
  if (config.model.attention == "cudnn") config.model.attention = "fused";
  mesa::use_threads(config);
  const mesa::NetConfig net = mesa::model_config(config, static_cast<int64_t>(loaded.class_names.size()));
  const mesa::TransformOptions transform = mesa::make_transform(config, net.input());
  mesa::BuiltModel model(config, net, mesa::choose_device(device));
  mesa::load_weights(model.params, loaded.weights, path);
  if (const std::string bad = mesa::first_bad_parameter(model.params); !bad.empty())
    throw mesa::Error(mesa::concat(path, ": the weights are not finite, first in ", bad));
  const auto test = mesa::make_datasets(config, net.input(), false).test;
  check_classes(loaded.class_names, test->class_names(), path);
  mesa::Loader loader(test, transform, mesa::make_loader_options(config, false, model.device));
  const int64_t total = test->size();
  const mesa::EvalResult result = mesa::evaluate(model, loader, transform, {}, [&](int64_t done) { show(done, total); });
  for (const std::string& sample : loader.skipped_samples()) std::fprintf(stderr, "warning: a bad sample is left out: %s\n", sample.c_str());
  std::printf("top-1 %.2f %%, top-5 %.2f %%, loss %.4f, %lld images, %.1f images/s%s\n", result.top1, result.top5, result.loss,
              static_cast<long long>(result.images), result.images_per_second(), loaded.averaged ? ", averaged weights" : "");
  if (!json.empty()) {
    const nlohmann::json out{{"checkpoint", path},          {"weights", loaded.averaged ? "ema" : "raw"},
                             {"top1", result.top1},         {"top5", result.top5},
                             {"loss", result.loss},         {"images", result.images},
                             {"left_out", result.left_out}, {"images_per_second", result.images_per_second()}};
    mesa::write_file_atomically(json, out.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Evaluates a checkpoint: top-1, top-5, loss, images/s.", "mesa-eval");
  std::string checkpoint, weights = "auto", data, json, device = "auto";
  std::vector<std::string> overrides;
  int64_t batch_size = 0;
  app.add_option("checkpoint", checkpoint, "a checkpoint's folder, a run's folder (its best), or a safetensors file of it")
      ->required()->type_name("CHECKPOINT");
  app.add_option("--weights", weights,
                 "auto, ema or raw: of a folder, the moving average of the weights (auto: if it has one), or the weights")
      ->check(CLI::IsMember({"auto", "ema", "raw"}))
      ->capture_default_str();
  app.add_option("--data", data, "folder of the data (default: where the run had it); training files need not be there")->type_name("PATH");
  app.add_option("--batch-size", batch_size, "images a batch")->check(CLI::Range(int64_t{1}, int64_t{1'000'000}));
  app.add_option("--set", overrides, "override one key of the run's config (repeatable)")->type_name("KEY=VALUE")->expected(1)->take_all();
  app.add_option("--device", device, "auto, cpu or cuda: where to compute, wherever it was trained")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->capture_default_str();
  app.add_option("--json", json, "also write the result to this file")->type_name("FILE");
  app.footer("Exit codes: 0 done; 1 failed; 2 wrong usage or config.");
  return mesa::run_app(app, argc, argv,
                       [&] { return evaluate_checkpoint(checkpoint, kind_of(weights), data, batch_size, overrides, device, json); });
}
