// How a checkpoint comes to the disk: a copy in host memory, from which files are written while training goes on.
#include <nlohmann/json.hpp>

#include "checkpoint_files.h"
#include "mesa/kernels/elementwise.h"
#include "mesa/train/files.h"

namespace mesa {
namespace {

using nlohmann::json;

std::string state_json(const TrainingState& state, const Optimizer& optimizer, const Ema* ema) {
  json out{{"format", kStateFormat}, {"optimizer", optimizer.name()}, {"optimizer_steps", optimizer.steps()}};
  if (ema != nullptr) out["ema_updates"] = ema->updates();
  const auto write = [&](const char* name, const auto& value) { out[name] = value; };
  each_field(state, write), each_later_field(state, write);
  return out.dump(2) + "\n";
}

/// Where copies of a device's tensors lie: memory that a GPU copies to directly, and for a plan the plan's own.
Device host_of(Device device) {
  if (device.kind == DeviceKind::cuda) return kPinned;
  return device.kind == DeviceKind::meta ? kMeta : kCpu;
}

/// A list of copies, made into the memory of an older one where the tensors are still the same.
class Copies {
 public:
  explicit Copies(std::vector<NamedTensor> older) : older_(std::move(older)) {}
  void add(const std::string& name, const Tensor& live) {
    const Device host = host_of(live.device());
    Tensor copy;
    if (const size_t i = copies_.size(); i < older_.size() && older_[i].name == name) copy = older_[i].tensor;
    const bool fits = copy.defined() && copy.shape() == live.shape() && copy.dtype() == live.dtype() && copy.device() == host;
    if (!fits) copy = Tensor::empty(live.shape(), live.dtype(), host);
    if (live.device() == kCpu && is_floating(live.dtype()))
      kernels::copy(live, copy);  // on all threads
    else
      transfer(live, copy);
    copies_.push_back({name, copy});
  }
  void add(const std::string& prefix, const std::map<std::string, Tensor>& live) {
    for (const auto& [name, tensor] : live) add(prefix + name, tensor);
  }
  std::vector<NamedTensor> list() { return std::move(copies_); }

 private:
  std::vector<NamedTensor> older_, copies_;
};

}  // namespace

int64_t CheckpointData::bytes() const {
  int64_t sum = 0;
  for (const auto* list : {&weights, &averages, &buffers, &tensors})
    for (const NamedTensor& t : *list) sum += t.tensor.bytes();
  return sum;
}

CheckpointData snapshot_checkpoint(const CheckpointParts& parts, const TrainingState& state, CheckpointData reuse) {
  RunConfig trained_by = parts.config;
  trained_by.output.clear();  // the same training writes the same bytes wherever it goes
  CheckpointData out;
  out.state = state;
  out.metadata = {{"format", "pt"},
                  {"mesa.config", to_yaml(trained_by)},
                  {"mesa.class_names", json(parts.class_names).dump(-1, ' ', false, json::error_handler_t::replace)}};
  Copies weights(std::move(reuse.weights)), buffers(std::move(reuse.buffers)), averages(std::move(reuse.averages)),
      tensors(std::move(reuse.tensors));
  for (const Param& param : parts.params.params()) weights.add(param.name, param.value);
  for (const ModelBuffer& buffer : parts.params.buffers()) buffers.add(buffer.name, buffer.value);
  if (parts.ema != nullptr) averages.add("", parts.ema->state());
  tensors.add("optimizer/", parts.moments);
  tensors.add("storage/", parts.policy.state());
  out.averaged = parts.ema != nullptr;
  out.weights = weights.list(), out.buffers = buffers.list(), out.averages = averages.list(), out.tensors = tensors.list();
  out.state_file = state_json(state, parts.optimizer, parts.ema);
  return out;
}

void write_checkpoint(const std::string& folder, const CheckpointData& data, const std::string& former) {
  write_folder_atomically(
      folder,
      [&](const std::string& at) {
        const auto write_weights = [&](const char* name, std::vector<NamedTensor> weights) {
          weights.insert(weights.end(), data.buffers.begin(), data.buffers.end());  // an average has the statistics of the last step
          write_safetensors(at + "/" + name, weights, data.metadata);
        };
        write_weights(kModelFile, data.weights);
        if (data.averaged) write_weights(kEmaFile, data.averages);
        write_safetensors(at + "/" + kStateTensors, data.tensors);
        OutputFile file(at + "/" + kStateFile);
        file.write(data.state_file);
        file.close();
      },
      former);
}

void save_checkpoint(const std::string& folder, const RunConfig& config, const std::vector<std::string>& class_names,
                     const ParamStore& params, const Optimizer& optimizer, const StoragePolicy& policy, const TrainingState& state,
                     const Ema* ema) {
  write_checkpoint(folder, snapshot_checkpoint({config, class_names, params, optimizer, optimizer.state(), policy, ema}, state));
}

}  // namespace mesa
