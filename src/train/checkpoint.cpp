#include "mesa/train/checkpoint.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "config_keys.h"
#include "mesa/base/files.h"
#include "mesa/kernels/elementwise.h"
#include "mesa/models/resize.h"
#include "mesa/train/files.h"
#include "mesa/train/safetensors.h"
#include "weight_names.h"

namespace mesa {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr const char *kModelFile = "model.safetensors", *kEmaFile = "ema.safetensors", *kStateTensors = "state.safetensors",
                     *kStateFile = "state.json";
constexpr int kStateFormat = 1;

/// One list of the state's fields serves both directions.
template <class State, class F>
void each_field(State& s, F&& f) {
  f("epoch", s.epoch), f("batch", s.batch), f("step", s.step), f("micro_step", s.micro_step);
  f("bad_steps", s.bad_steps), f("bad_in_a_row", s.bad_in_a_row);
  f("epoch_loss", s.epoch_loss), f("epoch_images", s.epoch_images), f("epoch_seconds", s.epoch_seconds);
  f("train_seconds", s.train_seconds), f("train_images", s.train_images), f("bad_samples", s.bad_samples);
  f("interval_loss", s.interval_loss), f("interval_images", s.interval_images);
  f("interval_seconds", s.interval_seconds), f("interval_wait", s.interval_wait);
  f("best_top1", s.best_top1), f("evaluated_step", s.evaluated_step), f("peak_bytes", s.peak_bytes);
  f("eval_top1", s.eval_top1), f("eval_top5", s.eval_top5), f("eval_loss", s.eval_loss), f("train_loss", s.train_loss);
}
/// Those that the first checkpoints did not have.
template <class State, class F>
void each_later_field(State& s, F&& f) {
  f("eval_top1_ema", s.eval_top1_ema), f("eval_top5_ema", s.eval_top5_ema), f("eval_loss_ema", s.eval_loss_ema);
  f("ranks", s.ranks);
}

std::string state_json(const TrainingState& state, const Optimizer& optimizer, const Ema* ema) {
  json out{{"format", kStateFormat}, {"optimizer", optimizer.name()}, {"optimizer_steps", optimizer.steps()}};
  if (ema != nullptr) out["ema_updates"] = ema->updates();
  const auto write = [&](const char* name, const auto& value) { out[name] = value; };
  each_field(state, write), each_later_field(state, write);
  return out.dump(2) + "\n";
}

std::vector<NamedTensor> prefixed(const std::string& prefix, const std::map<std::string, Tensor>& tensors) {
  std::vector<NamedTensor> out;
  for (const auto& [name, tensor] : tensors) out.push_back({prefix + name, to(tensor, kCpu)});
  return out;
}

std::map<std::string, Tensor> with_prefix(const SafetensorsFile& file, const std::string& prefix) {
  std::map<std::string, Tensor> out;
  for (const auto& [name, tensor] : file.tensors)
    if (name.starts_with(prefix)) out[name.substr(prefix.size())] = tensor;
  return out;
}

}  // namespace

void save_checkpoint(const std::string& folder, const RunConfig& config, const std::vector<std::string>& class_names,
                     const ParamStore& params, const Optimizer& optimizer, const StoragePolicy& policy, const TrainingState& state,
                     const Ema* ema) {
  write_folder_atomically(folder, [&](const std::string& at) {
    RunConfig trained_by = config;
    trained_by.output.clear();  // the same training writes the same bytes wherever it goes
    const std::map<std::string, std::string> metadata{
        {"format", "pt"},
        {"mesa.config", to_yaml(trained_by)},
        {"mesa.class_names", json(class_names).dump(-1, ' ', false, json::error_handler_t::replace)}};
    std::vector<NamedTensor> weights;
    for (const Param& param : params.params()) weights.push_back({param.name, to(param.value, kCpu)});
    std::vector<NamedTensor> buffers;  // an average of weights has the running statistics of the last step
    for (const ModelBuffer& buffer : params.buffers()) buffers.push_back({buffer.name, to(buffer.value, kCpu)});
    weights.insert(weights.end(), buffers.begin(), buffers.end());
    write_safetensors(at + "/" + kModelFile, weights, metadata);
    if (ema != nullptr) {
      weights = prefixed("", ema->state());
      weights.insert(weights.end(), buffers.begin(), buffers.end());
      write_safetensors(at + "/" + kEmaFile, weights, metadata);
    }
    std::vector<NamedTensor> tensors = prefixed("optimizer/", optimizer.state());
    for (NamedTensor& range : prefixed("storage/", policy.state())) tensors.push_back(std::move(range));
    write_safetensors(at + "/" + kStateTensors, tensors);
    OutputFile file(at + "/" + kStateFile);
    file.write(state_json(state, optimizer, ema));
    file.close();
  });
}

std::string resolve_checkpoint(const std::string& path, const std::string& prefer) {
  check(fs::exists(path), "there is no checkpoint at ", path);
  if (fs::is_regular_file(path)) return path;
  const std::string run = path + "/checkpoints/", other = prefer == "best" ? "last" : "best";
  // ".old": where a folder waits while it is being replaced on file systems that cannot exchange two.
  for (const std::string& candidate : {path, run + prefer, run + prefer + ".old", run + other, run + other + ".old"})
    if (fs::is_regular_file(candidate + "/" + kModelFile)) return candidate;
  fail("", path, " is neither a checkpoint (no ", kModelFile, " in it) nor a run's folder (no checkpoints/last)");
}

std::string weights_file(const std::string& path, WeightsKind kind, bool verify) {
  const std::string at = resolve_checkpoint(path, "best");
  const bool average = fs::exists(at + "/" + kEmaFile);
  if (kind == WeightsKind::ema)
    check(average, at,
          fs::is_directory(at) ? " has no moving average of its weights (train.ema_decay was 0)"
                               : " is a file, and only a checkpoint's folder leaves a choice among its weights");
  const bool averaged = kind != WeightsKind::raw && average;
  const std::string file = fs::is_directory(at) ? at + "/" + (averaged ? kEmaFile : kModelFile) : at;
  const std::string folder = fs::absolute(file).parent_path().string();
  if (verify && (fs::is_directory(at) || fs::exists(folder + "/" + kStateFile)))
    verify_folder(folder);  // a file taken out of its checkpoint stands alone
  return file;
}

LoadedModel load_model(const std::string& path, WeightsKind kind, const RunConfig* given) {
  const std::string file = weights_file(path, kind);
  SafetensorsFile tensors = read_safetensors(file);
  const auto config = tensors.metadata.find("mesa.config"), names = tensors.metadata.find("mesa.class_names");
  check(given != nullptr || config != tensors.metadata.end(), file,
        " does not say which model it belongs to (no mesa.config in its metadata); --config names a config that does");
  LoadedModel out;
  out.averaged = fs::path(file).filename() == kEmaFile;
  out.config = given != nullptr ? *given : parse_config(config->second, file);
  if (given != nullptr) strip_wrappers(tensors);
  if (names != tensors.metadata.end()) {
    const json list = json::parse(names->second, nullptr, false);
    check(list.is_array(), file, ": its class names are damaged");
    for (const json& name : list) out.class_names.push_back(name.is_string() ? name.get<std::string>() : name.dump());
  }
  for (auto& [name, tensor] : tensors.tensors) out.weights[name] = tensor;
  return out;
}

namespace {

/// Converted on the host, then moved.
void fill_from(const Tensor& values, const Tensor& to) {
  const Tensor converted = Tensor::empty(values.shape(), to.dtype());
  kernels::copy(values, converted);
  transfer(converted, to);
}
void fill_parameter(Param& param, const Tensor& values) {
  fill_from(values, param.value);
  param.touch();
}

/// Of a classifier, which is made anew for other classes.
bool is_of_head(const std::string& name) { return name.starts_with("head") || name.starts_with("fc."); }

}  // namespace

[[noreturn]] static void refuse_weights(const std::string& source, const std::vector<std::string>& problems) {
  const std::string list = list_all(problems);
  fail("", source, " belongs to another model:", list.starts_with('\n') ? "" : " ", list);
}

void load_weights(ParamStore& params, const std::map<std::string, Tensor>& weights, const std::string& source) {
  std::vector<std::string> problems;
  std::map<std::string, Tensor> rest = weights;
  const auto take = [&](const std::string& name, const Tensor& value) {
    const auto found = rest.find(name);
    if (found == rest.end()) {
      problems.push_back("missing " + name + " " + to_string(value.shape()));
      return;
    }
    if (found->second.shape() != value.shape() || !is_floating(found->second.dtype()))
      problems.push_back(concat(name, " is ", found->second.shape(), " but the model has ", value.shape()));
    else
      fill_from(found->second, value);
    rest.erase(found);
  };
  for (Param& param : params.params()) take(param.name, param.value), param.touch();
  for (ModelBuffer& buffer : params.buffers()) take(buffer.name, buffer.value);
  for (const auto& [name, tensor] : rest)
    if (!is_derived(name)) problems.push_back("unexpected " + name + " " + to_string(tensor.shape()));
  if (!problems.empty()) refuse_weights(source, problems);
}

namespace {

/// The values for a parameter whose rows lie in a grid, from those of another grid, which must be square; undefined if they are not.
Tensor resized(const Param& param, const Tensor& values) {
  const Shape& shape = param.value.shape();
  const Param::Grid& grid = param.grid;
  if (grid.height == 0 || values.rank() != shape.rank() || shape[-1] == 0 || values.dim(-1) != shape[-1]) return {};
  const int64_t C = shape[-1], places = values.numel() / C - grid.prefix;
  const auto side = static_cast<int64_t>(std::lround(std::sqrt(static_cast<double>(std::max<int64_t>(places, 0)))));
  if (side == 0 || side * side != places) return {};
  const Tensor rows = Tensor::empty({grid.prefix + places, C}, DType::f32), out = Tensor::empty(shape, DType::f32);
  kernels::copy(values, rows.reshape(values.shape()));
  const Tensor to = out.reshape({out.numel() / C, C});
  if (grid.prefix > 0) kernels::copy(rows.narrow(0, 0, grid.prefix), to.narrow(0, 0, grid.prefix));
  const Tensor inner = Tensor::empty({places, C}, DType::f32);
  kernels::copy(rows.narrow(0, grid.prefix, places), inner);
  kernels::copy(resize_bicubic(inner, side, side, grid.height, grid.width), to.narrow(0, grid.prefix, grid.height * grid.width));
  return out;
}

}  // namespace

std::string start_from_weights(ParamStore& params, const std::string& path) {
  const std::string file = weights_file(path, WeightsKind::automatic);
  SafetensorsFile weights = read_safetensors(file);
  strip_wrappers(weights);
  std::vector<std::string> problems, adapted, fresh, unused;
  std::set<std::string> known;
  for (Param& param : params.params()) {
    known.insert(param.name);
    const Tensor* values = weights.find(param.name);
    const bool floating = values != nullptr && is_floating(values->dtype()), head = is_of_head(param.name);
    if (floating && values->shape() == param.value.shape()) {
      fill_parameter(param, *values);
    } else if (const Tensor other = floating ? resized(param, *values) : Tensor(); other.defined()) {
      fill_parameter(param, other);
      adapted.push_back(concat(param.name, " ", values->shape(), " to ", param.value.shape()));
    } else if (head && (values == nullptr || floating)) {
      fresh.push_back(param.name);
    } else {
      problems.push_back(values == nullptr ? concat("missing ", param.name, " ", param.value.shape())
                                           : concat(param.name, " is ", values->shape(), " but the model has ", param.value.shape()));
    }
  }
  for (ModelBuffer& buffer : params.buffers()) {
    known.insert(buffer.name);
    const Tensor* values = weights.find(buffer.name);
    if (values != nullptr && values->shape() == buffer.value.shape() && is_floating(values->dtype()))
      fill_from(*values, buffer.value);
    else
      problems.push_back(concat(values == nullptr ? "missing " : "of another form ", buffer.name, " ", buffer.value.shape()));
  }
  for (const NamedTensor& tensor : weights.tensors)
    if (known.count(tensor.name) == 0 && !is_derived(tensor.name)) unused.push_back(tensor.name);
  if (!problems.empty()) refuse_weights(file, problems);
  std::string text = "started from " + file;
  if (!adapted.empty()) text += "; resized " + list_all(adapted);
  if (!fresh.empty()) text += "; not in it, so with first values: " + list_all(fresh);
  if (!unused.empty()) text += "; not of this model, so unused: " + list_all(unused);
  return text;
}

namespace {

int64_t count_of(const json& state, const char* name, const std::string& folder) {
  check(state.contains(name) && state[name].is_number_integer(), folder, "/", kStateFile, " has no ", name);
  return state[name].get<int64_t>();
}

void load_optimizer(const json& state, const SafetensorsFile& tensors, const RunConfig& config, const std::string& folder,
                    Optimizer& optimizer) {
  const std::string was = !state.contains("optimizer")     ? "adamw"  // once the only one
                          : state["optimizer"].is_string() ? state["optimizer"].get<std::string>()
                                                           : state["optimizer"].dump();
  if (was != optimizer.name())
    config.refuse("optimizer.name", folder, " was trained by ", was, ", whose state ", optimizer.name(), " cannot go on with; resume with ",
                  was, ", or begin a new run with its weights (train.weights: ", folder, ")");
  const std::map<std::string, Tensor> moments = with_prefix(tensors, "optimizer/");
  if (moments.empty() && !optimizer.state().empty())
    config.refuse("optimizer.momentum", folder, " was trained without momentum and has nothing to go on with; resume with 0");
  optimizer.load_state(moments, count_of(state, "optimizer_steps", folder));
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
  load_optimizer(state, tensors, config, folder, optimizer);
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

std::string find_checkpoint(const std::string& wish, const std::string& output) {
  if (wish.empty()) return "";
  if (wish != "auto") return resolve_checkpoint(wish, "last");
  bool rejected = false;
  for (const char* which : {"last", "best"}) {
    const std::string folder = output + "/checkpoints/" + which;
    if (!recover_folder(folder)) continue;
    try {
      verify_folder(folder);
      if (rejected) std::fprintf(stderr, "warning: going back to %s\n", folder.c_str());
      return folder;
    } catch (const Error& e) {
      std::fprintf(stderr, "warning: %s cannot be used: %s\n", folder.c_str(), e.what());
      rejected = true;
    }
  }
  if (rejected) throw Error(concat("no checkpoint of ", output, " is whole; start again with another --output"));
  return "";
}

bool lies_in(const std::string& path, const std::string& folder) {
  const fs::path whole = fs::weakly_canonical(path), part = fs::weakly_canonical(folder);
  return std::mismatch(part.begin(), part.end(), whole.begin(), whole.end()).first == part.end();
}

std::string describe_changes(const LoadedRun& loaded, const RunConfig& config) {
  std::string names;
  for (const auto& [key, was] : changed_keys(loaded.config, config)) {
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
