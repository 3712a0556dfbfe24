// Weights into a model: exactly its own, or what fits of another's.
#include <algorithm>
#include <cmath>
#include <set>

#include "mesa/kernels/elementwise.h"
#include "mesa/models/model.h"
#include "mesa/models/resize.h"
#include "mesa/train/checkpoint.h"
#include "mesa/train/lora.h"
#include "mesa/train/safetensors.h"
#include "weight_names.h"

namespace mesa {
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
  rename_as_here(weights);
  const int64_t merged = merge_lora(weights, file);
  const std::set<std::string> with_factors = adapted_linears(params);
  std::vector<std::string> problems, adapted, fresh, unused;
  std::set<std::string> known;
  for (Param& param : params.params()) {
    known.insert(param.name);
    if (is_lora_factor(param.name)) continue;  // begins as it was made
    const Tensor* values = weights.find(param.name);
    const bool floating = values != nullptr && is_floating(values->dtype()), head = is_of_head(param.name);
    if (floating && values->shape() == param.value.shape()) {
      fill_parameter(param, *values);
    } else if (const Tensor other = floating ? resized(param, *values) : Tensor(); other.defined()) {
      fill_parameter(param, other);
      adapted.push_back(concat(param.name, " ", values->shape(), " to ", param.value.shape()));
    } else if (head && (values == nullptr || floating)) {
      check(param.trainable || with_factors.count(linear_of(param.name)) == 0, param.name, " is not in ", file,
            " in this shape and begins anew, but LoRA freezes it: leave it out of lora.targets, and it is trained itself");
      check(param.trainable, param.name, " is not in ", file, " in this shape and begins anew, but train.frozen keeps it from learning");
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
  if (!problems.empty()) {
    for (const std::string& name : unused) problems.push_back("unexpected " + name);
    refuse_weights(file, problems);
  }
  std::string text = "started from " + file;
  if (merged > 0) text += concat("; merged its LoRA into ", merged, " linears");
  if (!adapted.empty()) text += "; resized " + list_all(adapted);
  if (!fresh.empty()) text += "; not in it, so with first values: " + list_all(fresh);
  if (!unused.empty()) text += "; not of this model, so unused: " + list_all(unused);
  return text;
}

}  // namespace mesa
