#include "mesa/train/checkpoint.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "checkpoint_files.h"
#include "config_keys.h"
#include "mesa/base/files.h"
#include "mesa/base/random.h"
#include "mesa/kernels/elementwise.h"
#include "mesa/train/lora.h"
#include "mesa/train/safetensors.h"
#include "weight_names.h"

namespace mesa {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

std::map<std::string, Tensor> with_prefix(const SafetensorsFile& file, const std::string& prefix) {
  std::map<std::string, Tensor> out;
  for (const auto& [name, tensor] : file.tensors)
    if (name.starts_with(prefix)) out[name.substr(prefix.size())] = tensor;
  return out;
}

}  // namespace

LoadedModel load_model(const std::string& path, WeightsKind kind, const RunConfig* given) {
  const std::string file = weights_file(path, kind);
  SafetensorsFile tensors = read_safetensors(file);
  const auto config = tensors.metadata.find("mesa.config"), names = tensors.metadata.find("mesa.class_names");
  check(given != nullptr || config != tensors.metadata.end(), file,
        " does not say which model it belongs to (no mesa.config in its metadata); --config names a config that does");
  LoadedModel out;
  out.averaged = fs::path(file).filename() == kEmaFile;
  out.config = given != nullptr ? *given : parse_config(config->second, file);
  if (given != nullptr) rename_as_here(tensors);
  if (names != tensors.metadata.end()) {
    const json list = json::parse(names->second, nullptr, false);
    check(list.is_array(), file, ": its class names are damaged");
    for (const json& name : list) out.class_names.push_back(name.is_string() ? name.get<std::string>() : name.dump());
  }
  for (auto& [name, tensor] : tensors.tensors) out.weights[name] = tensor;
  return out;
}

namespace {

int64_t count_of(const json& state, const char* name, const std::string& folder) {
  check(state.contains(name) && state[name].is_number_integer(), folder, "/", kStateFile, " has no ", name);
  return state[name].get<int64_t>();
}

uint64_t hash_of(const std::map<std::string, Tensor>& tensors) {
  uint64_t hash = 0;
  for (const auto& [name, tensor] : tensors)
    hash = mix64(hash ^ hash_name({static_cast<const char*>(tensor.raw()), static_cast<size_t>(tensor.bytes())}));
  return hash;
}

/// Returns a hash of the whole state, of which a shared optimizer takes a part.
uint64_t load_optimizer(const json& state, const SafetensorsFile& tensors, const RunConfig& config, const std::string& folder,
                    Optimizer& optimizer) {
  const std::string was = !state.contains("optimizer")     ? "adamw"  // once the only one
                          : state["optimizer"].is_string() ? state["optimizer"].get<std::string>()
                                                           : state["optimizer"].dump();
  if (was != optimizer.name())
    config.refuse("optimizer.name", folder, " was trained by ", was, ", whose state ", optimizer.name(), " cannot go on with; resume with ",
                  was, ", or begin a new run with its weights (train.weights: ", folder, ")");
  const std::map<std::string, Tensor> moments = with_prefix(tensors, "optimizer/");
  if (moments.empty() && optimizer.remembers())
    config.refuse("optimizer.momentum", folder, " was trained without momentum and has nothing to go on with; resume with 0");
  optimizer.load_state(moments, count_of(state, "optimizer_steps", folder));
  return mix64(hash_of(moments) ^ static_cast<uint64_t>(optimizer.steps()));
}

/// False if the checkpoint has none.
bool load_average(const json& state, const std::string& folder, Ema& ema) {
  ema.restart();
  if (!fs::exists(folder + "/" + kEmaFile)) return false;
  ema.load_state(with_prefix(read_safetensors(folder + "/" + kEmaFile), ""), count_of(state, "ema_updates", folder));
  return true;
}

}  // namespace

LoadedRun load_checkpoint(const std::string& folder, const RunConfig& config, ParamStore& params, Optimizer& optimizer,
                          StoragePolicy& policy, Ema* ema) {
  check(fs::is_directory(folder), folder, " is a file of weights; to resume, the folder of a whole checkpoint is needed");
  LoadedModel model = load_model(folder, WeightsKind::raw);
  load_weights(params, model.weights, folder + "/" + kModelFile);
  const json state = json::parse(read_text(folder + "/" + kStateFile), nullptr, false);
  check(state.is_object() && state.value("format", 0) == kStateFormat, folder, "/", kStateFile,
        " is not a training state that this version reads");
  LoadedRun out;
  const auto read = [&]<class T>(const char* name, T& value) {
    const bool nan = std::is_floating_point_v<T> && state.contains(name) && state[name].is_null();  // JSON's only way to say it
    check(nan || (state.contains(name) && state[name].is_number()), folder, "/", kStateFile, " has no number '", name, "'");
    if constexpr (std::is_floating_point_v<T>)
      value = nan ? std::nan("") : state[name].template get<T>();
    else
      state[name].get_to(value);
  };
  each_field(out.state, read);
  each_later_field(out.state, [&](const char* name, auto& value) {
    if (state.contains(name)) read(name, value);
  });
  const SafetensorsFile tensors = read_safetensors(folder + "/" + kStateTensors);
  out.optimizer_hash = load_optimizer(state, tensors, config, folder, optimizer);
  if (ema != nullptr) out.average_begins = !load_average(state, folder, *ema);
  std::map<std::string, Tensor> ranges;  // owned by the policy from here on, under its own kind of memory
  for (const auto& [name, tensor] : with_prefix(tensors, "storage/")) {
    const Tensor copy = Tensor::empty(tensor.shape(), tensor.dtype(), kCpu, MemoryKind::optimizer);
    kernels::copy(tensor, copy);
    ranges[name] = copy;
  }
  if (model.config.storage == config.storage) policy.load_state(std::move(ranges));
  out.config = std::move(model.config);
  return out;
}

bool lies_in(const std::string& path, const std::string& folder) {
  const fs::path whole = fs::weakly_canonical(path), part = fs::weakly_canonical(folder);
  return std::mismatch(part.begin(), part.end(), whole.begin(), whole.end()).first == part.end();
}

std::string describe_changes(const LoadedRun& loaded, const RunConfig& config) {
  std::string names;
  check_same_factor(loaded.config, config);
  for (const auto& [key, was] : changed_keys(loaded.config, config)) {
    if (key == "lora.alpha") continue;  // another way to say the same factor
    const bool batch =
        key == "train.batch_size" && loaded.state.ranks == config.ranks;  // else another number of ranks has parts of its own
    const bool order = batch || key == "seed" || key == "data.kind" || key == "data.train_size";
    if (order && loaded.state.batch > 0)
      config.refuse(key, "the checkpoint stopped within an epoch, where this cannot change; it was ", was);
    names += concat(names.empty() ? "" : ", ", key, " (was ", was, ")");
  }
  return names;
}

std::vector<std::pair<std::string, std::string>> changed_keys(const RunConfig& then, const RunConfig& now) {
  static const std::set<std::string> harmless{"output",
                                              "device",
                                              "data.path",
                                              "data.workers",
                                              "data.prefetch",
                                              "data.max_pixels",
                                              "train.log_interval",
                                              "train.checkpoint_interval",
                                              "train.keep",
                                              "train.stop_signals",
                                              "train.max_bad_steps",
                                              "train.steps",
                                              "train.weights",
                                              "train.eval_batch_size",
                                              "train.force_precision"};
  RunConfig a = then, b = now;  // the table's accessors are not const
  for (RunConfig* config : {&a, &b}) config->optimizer = with_defaults(config->optimizer);
  std::vector<std::pair<std::string, std::string>> out;
  for (const config::Key& key : config::keys()) {
    if (harmless.count(key.name)) continue;
    const std::string was = config::write(key, a);
    if (was != config::write(key, b)) out.emplace_back(key.name, was.empty() ? "unset" : was);
  }
  if (!(a.storage == b.storage)) out.emplace_back("storage", a.storage.name);
  return out;
}

}  // namespace mesa
