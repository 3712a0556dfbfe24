// mesa-eval: how well a checkpoint does; it alone says which model and which preprocessing.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>

#include "app.h"
#include "mesa/train/best_classes.h"
#include "mesa/train/checkpoint.h"
#include "mesa/train/confusion.h"
#include "mesa/train/evaluate.h"
#include "mesa/train/files.h"
#include "mesa/train/lora.h"
#include "mesa/train/real_labels.h"

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
    const std::string then = i < trained.size() ? "'" + trained[i] + "'" : "missing",
                      now = i < data.size() ? "'" + data[i] + "'" : "missing";
    if (then == now) continue;
    throw mesa::Error(
        mesa::concat(checkpoint, ": the classes of these data are not those of its training: class ", i, " was ", then, " and is ", now));
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

struct Arguments {
  std::string checkpoint, config, weights = "auto", data, json, device = "auto", real, confusion, predictions;
  std::optional<std::string> per_class;  // a file, or "" for the terminal
  std::vector<std::string> overrides;
  int64_t batch_size = 0;
  bool flip = false;
};

/// Of a model without a config in its file the one that is given; overrides come last.
mesa::LoadedModel load(const Arguments& args) {
  const mesa::WeightsKind kind = kind_of(args.weights);
  if (!args.config.empty()) {
    const mesa::RunConfig config = mesa::load_config(args.config, args.overrides);
    return mesa::load_model(args.checkpoint, kind, &config);
  }
  mesa::LoadedModel loaded = mesa::load_model(args.checkpoint, kind);
  if (args.overrides.empty()) return loaded;
  mesa::RunConfig changed = mesa::parse_config(mesa::to_yaml(loaded.config), args.checkpoint, args.overrides);
  mesa::check_same_factor(loaded.config, changed);
  loaded.config = std::move(changed);
  return loaded;
}

/// Of a file that does not name its classes; 0 if it has no head.
int64_t classes_of_head(const std::map<std::string, mesa::Tensor>& weights) {
  for (const char* name : {"head.bias", "head.fc.bias", "fc.bias"})
    if (const auto found = weights.find(name); found != weights.end() && found->second.rank() == 1) return found->second.dim(0);
  return 0;
}

/// A table for people: of the classes, and of what is confused most.
void print_classes(const mesa::Confusion& confusion) {
  std::printf("%6s %9s %9s %10s  class, most often taken for\n", "images", "top-1 %", "top-5 %", "precision");
  const auto number = [](double x) { return std::isnan(x) ? std::string("-") : mesa::concat(std::round(100 * x) / 100); };
  for (const mesa::ClassRow& r : confusion.rows()) {
    const std::string wrong = r.confused_with < 0 ? "" : mesa::concat(", ", confusion.name(r.confused_with), " (", r.confused, ")");
    std::printf("%6lld %9s %9s %10s  %s%s\n", static_cast<long long>(r.images), number(r.top1()).c_str(), number(r.top5()).c_str(),
                number(r.precision()).c_str(), r.name.c_str(), wrong.c_str());
  }
}

nlohmann::json to_json(const mesa::Confusion& confusion) {
  nlohmann::json classes = nlohmann::json::array();
  for (const mesa::ClassRow& r : confusion.rows()) {
    classes.push_back({{"name", r.name},
                       {"images", r.images},
                       {"top1", r.top1()},  // null of a class without images
                       {"top5", r.top5()},
                       {"precision", r.precision()},
                       {"predicted", r.predicted}});
    if (r.confused_with >= 0) classes.back()["confused_with"] = r.confused_with, classes.back()["confused"] = r.confused;
  }
  return classes;
}

/// What was asked for beside the totals: to files, to the terminal, and into `json`.
void tell_of_classes(const Arguments& args, const mesa::Confusion& confusion, nlohmann::json& json) {
  json["top1_class_mean"] = confusion.mean_top1();
  if (args.per_class) {
    json["classes"] = to_json(confusion);
    if (args.per_class->empty())
      print_classes(confusion);
    else
      mesa::write_file_atomically(*args.per_class, mesa::classes_csv(confusion));
  }
  if (args.confusion.empty()) return;
  json["confusion"] = nlohmann::json::array();  // [truth, predicted, images]
  for (const mesa::ConfusionCell& cell : confusion.cells()) json["confusion"].push_back({cell.truth, cell.predicted, cell.images});
  if (args.confusion.ends_with(".csv")) {
    mesa::write_file_atomically(args.confusion, mesa::confusion_csv(confusion));
  } else {
    const std::vector<uint8_t> png = mesa::to_png(mesa::draw_confusion(confusion));
    mesa::write_file_atomically(args.confusion, std::string(png.begin(), png.end()));
  }
  for (const mesa::ConfusionCell& cell : confusion.most_confused(10))
    std::printf("%6lld images of %s taken for %s\n", static_cast<long long>(cell.images), confusion.name(cell.truth).c_str(),
                confusion.name(cell.predicted).c_str());
}

void check_files(const Arguments& args) {
  const bool png = args.confusion.ends_with(".png") || args.confusion.ends_with(".csv");
  if (!args.confusion.empty() && !png) throw mesa::UsageError("--confusion: " + args.confusion + " must end in .png or .csv");
  for (const std::string& file : {args.json, args.confusion, args.predictions, args.per_class.value_or("")})
    if (!file.empty()) mesa::check_can_write(file);
}

void tell(const Arguments& args, bool averaged, bool flip, const mesa::EvalResult& result, const mesa::RealResult* real,
          const mesa::Confusion& confusion) {
  std::printf("top-1 %.2f %%, top-5 %.2f %%, loss %.4f, %lld images, %.1f images/s%s%s\n", result.top1, result.top5, result.loss,
              static_cast<long long>(result.images), result.images_per_second(), averaged ? ", averaged weights" : "",
              flip ? ", with mirror images" : "");
  if (!std::isfinite(result.loss))
    std::fprintf(stderr, "warning: the loss is not finite: logits overflow, and these weights are of no use\n");
  nlohmann::json out{{"checkpoint", args.checkpoint},
                     {"weights", averaged ? "ema" : "raw"},
                     {"top1", result.top1},
                     {"top5", result.top5},
                     {"loss", result.loss},
                     {"images", result.images},
                     {"left_out", result.left_out},
                     {"images_per_second", result.images_per_second()},
                     {"flip", flip}};
  if (real) {
    std::printf("ReaL top-1 %.2f %%, top-5 %.2f %%, %lld images, %lld without labels\n", real->top1, real->top5,
                static_cast<long long>(real->images), static_cast<long long>(real->unlabelled));
    out["real"] = {{"top1", real->top1}, {"top5", real->top5}, {"images", real->images}, {"unlabelled", real->unlabelled}};
  }
  tell_of_classes(args, confusion, out);
  if (!args.json.empty()) mesa::write_file_atomically(args.json, out.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
}

/// Everything that was asked for, by the leader; the others give their parts.
int evaluate(const Arguments& args, mesa::LoadedModel& loaded, bool leads, const mesa::AddUp& add_up) {
  const mesa::RunConfig& config = loaded.config;
  const int64_t classes = loaded.class_names.empty() ? classes_of_head(loaded.weights) : static_cast<int64_t>(loaded.class_names.size());
  const mesa::NetConfig net = mesa::model_config(config, classes);
  const mesa::TransformOptions transform = mesa::make_transform(config, net.input());
  mesa::BuiltModel model(config, net, mesa::choose_device(args.device));
  mesa::load_weights(model.params, loaded.weights, args.checkpoint);
  if (const std::string bad = mesa::first_bad_parameter(model.params); !bad.empty())
    throw mesa::Error(mesa::concat(args.checkpoint, ": the weights are not finite, first in ", bad));
  const auto test = mesa::make_datasets(config, net.input(), false).test;
  if (!loaded.class_names.empty())
    check_classes(loaded.class_names, test->class_names(), args.checkpoint);
  else if (leads && test->classes() < net.input().classes)
    std::fprintf(stderr, "warning: the data have %lld classes and the model %lld: label 0 is taken for the model's class 0, and so on\n",
                 static_cast<long long>(test->classes()), static_cast<long long>(net.input().classes));
  mesa::Loader loader(test, transform, mesa::make_loader_options(config, false, model.device));
  const int64_t total = test->size();
  std::optional<mesa::RealLabels> real;
  if (!args.real.empty()) real.emplace(args.real, *test, net.input().classes);
  std::optional<mesa::BestClasses> best;
  if (!args.predictions.empty()) best.emplace(total, net.input().classes);
  mesa::Predictions predictions(total, net.input().classes, test->class_names());
  const auto look = [&](const mesa::Batch& batch, const mesa::Tensor& logits) {
    predictions.take(batch, logits);
    if (real) real->take(batch, logits);
    if (best) best->take(batch, logits);
  };
  const auto progress = [&](int64_t done) {
    if (leads) show(std::min(done * config.ranks, total), total);
  };
  const mesa::EvalResult result = mesa::evaluate(model, loader, transform, {}, progress, look, add_up);
  const mesa::Confusion confusion = predictions.finish(add_up);
  mesa::RealResult reassessed;
  if (real) reassessed = real->finish(add_up);
  if (best) best->finish(add_up);
  for (const std::string& sample : loader.skipped_samples())
    std::fprintf(stderr, "warning: a bad sample is left out: %s\n", sample.c_str());
  if (leads && best) mesa::write_file_atomically(args.predictions, best->csv(*test, test->class_names()));
  if (leads) tell(args, loaded.averaged, transform.eval_flip, result, real ? &reassessed : nullptr, confusion);
  return 0;
}

int evaluate_checkpoint(const Arguments& args) {
  check_files(args);
  mesa::LoadedModel loaded = load(args);
  mesa::RunConfig& config = loaded.config;
  if (!args.data.empty() && (config.data.kind == "shapes" || config.data.kind == "random"))
    throw mesa::UsageError(mesa::concat("--data: the run's data are generated (data.kind: ", config.data.kind, "), they have no folder"));
  if (!args.data.empty()) config.data.path = args.data;
  if (args.batch_size > 0) config.train.eval_batch_size = args.batch_size;
  if (args.flip) config.data.eval_flip = true;
  // The weights do not say where to compute: what only a GPU or another CPU has is replaced by its equal.
  config.device = args.device;
  config.train.force_precision = true;
  if (config.model.attention == "cudnn") config.model.attention = "fused";
  return mesa::evaluate_on_ranks(config, [&](bool leads, const mesa::AddUp& add_up) {
    try {
      return evaluate(args, loaded, leads, add_up);
    } catch (const mesa::OutOfMemory& e) {
      const int64_t batch = config.train.eval_batch_size > 0 ? config.train.eval_batch_size : config.train.batch_size;
      throw mesa::Error(mesa::concat(e.what(), "\nthe batches have ", batch, " images: a smaller --batch-size needs less"));
    }
  });
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Evaluates a checkpoint: top-1, top-5, loss, images/s.", "mesa-eval");
  Arguments args;
  app.add_option("checkpoint", args.checkpoint, "a checkpoint's folder, a run's folder (its best), or a safetensors file")
      ->required()
      ->type_name("CHECKPOINT");
  app.add_option("--config", args.config,
                 "config of the model and its preprocessing, for a safetensors file that does not say them itself (timm's, DeiT's)")
      ->type_name("CONFIG");
  app.add_option("--weights", args.weights,
                 "auto, ema or raw: of a folder, the moving average of the weights (auto: if it has one), or the weights")
      ->check(CLI::IsMember({"auto", "ema", "raw"}))
      ->capture_default_str();
  app.add_option("--data", args.data, "folder of the data (default: where the run had it); training files need not be there")
      ->type_name("PATH");
  app.add_option("--batch-size", args.batch_size, "images a batch")->check(CLI::Range(int64_t{1}, int64_t{1'000'000}));
  app.add_option("--set", args.overrides, "override one key of the run's config (repeatable)")
      ->type_name("KEY=VALUE")
      ->expected(1)
      ->take_all();
  app.add_option("--device", args.device, "auto, cpu or cuda: where to compute, wherever it was trained")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->capture_default_str();
  app.add_flag("--flip", args.flip, "evaluate each picture and its mirror image, and take the mean of their logits");
  app.add_option("--real", args.real, "also by reassessed labels (ReaL): real.json of ImageNet, or a map from names of pictures to lists")
      ->type_name("FILE");
  std::string per_class;
  const CLI::Option* per_class_option = app.add_option("--per-class", per_class, "a table of the classes, on the terminal or in this file")
                                            ->expected(0, 1)
                                            ->type_name("[FILE]");
  app.add_option("--confusion", args.confusion, "which classes are taken for which, as a picture, or as a table (.csv)")->type_name("FILE");
  app.add_option("--predictions", args.predictions, "a table (.csv) of the pictures: the best five classes of each and their probabilities")
      ->type_name("FILE");
  app.add_option("--json", args.json, "also write the results to this file")->type_name("FILE");
  std::string merge;
  CLI::Option* merge_option =
      app.add_option("--merge", merge, "evaluate nothing: write the weights with LoRA's factors merged into them to this safetensors file")
          ->type_name("FILE");
  for (const char* other :
       {"--config", "--data", "--set", "--json", "--flip", "--real", "--per-class", "--confusion", "--predictions", "--batch-size"})
    merge_option->excludes(other);
  app.footer("Exit codes: 0 done; 1 failed; 2 wrong usage or config; 69 another rank was lost.");
  return mesa::run_app(app, argc, argv, [&] {
    if (merge_option->count() > 0) {
      std::printf("%s\n", mesa::write_merged(args.checkpoint, kind_of(args.weights), merge).c_str());
      return 0;
    }
    if (per_class_option->count() > 0) args.per_class = per_class;
    return evaluate_checkpoint(args);
  });
}
