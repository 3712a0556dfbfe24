#include "mesa/train/lora.h"

#include <algorithm>
#include <filesystem>

#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/matmul.h"
#include "mesa/models/model.h"
#include "mesa/train/files.h"
#include "mesa/train/plan.h"

namespace mesa {
namespace {

/// "blocks.*.attn.qkv, blocks.*.attn.proj, ...": equal blocks once.
std::string list_of(const std::vector<std::string>& linears) {
  std::vector<std::string> folded;
  for (const std::string& path : linears)
    if (std::string name = fold_site(path); std::find(folded.begin(), folded.end(), name) == folded.end())
      folded.push_back(std::move(name));
  std::string list;
  for (size_t i = 0; i < folded.size() && i < 12; ++i) list += (i ? ", " : "") + folded[i];
  return list + (folded.size() > 12 ? ", ..." : "");
}

void check_targets(const RunConfig& config, const ParamStore& params) {
  for (const std::string& glob : config.lora.targets) {
    LoraOptions one;
    one.rank = 1, one.targets = {glob};
    const auto& linears = params.linears();
    if (std::any_of(linears.begin(), linears.end(), [&](const std::string& path) { return one.hits(path); })) continue;
    const std::string near = nearest(glob, linears);
    config.refuse("lora.targets", "no linear matches '", glob, "'", near.empty() ? "" : "; the nearest is " + near,
                  "; this model's linears are ", list_of(linears));
  }
}

/// Calls f for each glob; its Error gets the key's place.
template <class F>
void each_glob(const RunConfig& config, const char* key, const std::vector<std::string>& globs, const F& f) {
  for (const std::string& glob : globs) {
    try {
      f(glob);
    } catch (const Error& e) {
      config.refuse(key, e.what());
    }
  }
}

}  // namespace

LoraOptions lora_options(const RunConfig& config) {
  const LoraConfig& c = config.lora;
  return {c.rank, c.alpha.value_or(static_cast<double>(c.rank)), c.dropout, c.targets};
}

void check_same_factor(const RunConfig& then, const RunConfig& now) {
  if (then.lora.rank == 0 || then.lora.rank != now.lora.rank) return;  // another rank does not fit anyway
  const LoraOptions was = lora_options(then), is = lora_options(now);
  if (was.factor() != is.factor())
    now.refuse("lora.alpha", "the weights were trained with alpha ", was.alpha, ", which is part of what they mean; it cannot become ",
               is.alpha);
}

void choose_trained(const RunConfig& config, ParamStore& params) {
  if (config.lora.rank > 0) {
    check_targets(config, params);
    const std::set<std::string> adapted = adapted_linears(params);
    for (Param& param : params.params())
      param.trainable = is_lora_factor(param.name) || (is_of_head(param.name) && adapted.count(linear_of(param.name)) == 0);
    each_glob(config, "lora.train", config.lora.train, [&](const std::string& glob) { params.thaw(glob); });
  }
  each_glob(config, "train.frozen", config.train.frozen, [&](const std::string& glob) { params.freeze(glob); });
  for (const std::string& path : adapted_linears(params))
    if (params.at(path + ".lora_A.weight").trainable && !params.at(path + ".lora_B.weight").trainable)
      config.refuse("train.frozen", path, ".lora_B.weight begins as zeros: frozen, it keeps lora_A from learning anything");
}

std::string describe_lora(const RunConfig& config, const ParamStore& params) {
  const LoraOptions options = lora_options(config);
  int64_t trained = 0;
  for (const Param& param : params.params()) trained += param.trainable ? param.value.numel() : 0;
  return concat("rank ", options.rank, ", alpha ", options.alpha, " on ", adapted_linears(params).size(), " linears; ", trained, " of ",
                params.count(), " parameters are trained");
}

namespace {

/// The config that trained the weights.
RunConfig config_of(const SafetensorsFile& weights, const std::string& source) {
  const auto config = weights.metadata.find("mesa.config");
  check(config != weights.metadata.end(), source, " has LoRA's factors but does not say their alpha (no mesa.config in its metadata)");
  return parse_config(config->second, source);
}

Tensor as_f32(const Tensor& t) {
  const Tensor out = Tensor::empty(t.shape(), DType::f32, t.device(), MemoryKind::parameters);
  kernels::copy(t, out);
  return out;
}

/// w [O, I] + factor b [O, r] a [r, I]
Tensor merged(const Tensor& w, const Tensor& a, const Tensor& b, double factor) {
  const Tensor base = as_f32(w), scaled = as_f32(b), out = empty_like(base);
  kernels::scale(scaled, factor, scaled);
  kernels::matmul(scaled, as_f32(a), out, {}, base);
  return out;
}

}  // namespace

int64_t merge_lora(SafetensorsFile& weights, const std::string& source) {
  std::set<std::string> adapted;
  for (const NamedTensor& tensor : weights.tensors)
    if (is_lora_factor(tensor.name)) adapted.insert(linear_of(tensor.name));
  if (adapted.empty()) return 0;
  const LoraOptions options = lora_options(config_of(weights, source));
  check(options.rank > 0, source, " has LoRA's factors, of which its config (lora.rank: 0) knows nothing");
  for (NamedTensor& tensor : weights.tensors) {
    const std::string path = linear_of(tensor.name);
    if (tensor.name != path + ".weight" || adapted.erase(path) == 0) continue;
    const Tensor *a = weights.find(path + ".lora_A.weight"), *b = weights.find(path + ".lora_B.weight");
    const Shape& shape = tensor.tensor.shape();
    check(a != nullptr && b != nullptr && shape.rank() == 2 && a->shape() == Shape({options.rank, shape[1]}) &&
              b->shape() == Shape({shape[0], options.rank}) && is_floating(a->dtype()) && is_floating(b->dtype()) &&
              is_floating(tensor.tensor.dtype()),
          source, ": ", path, " is ", shape, " and lacks factors of rank ", options.rank, " that fit it");
    tensor.tensor = merged(tensor.tensor, *a, *b, options.factor());
  }
  check(adapted.empty(), source, " has LoRA's factors of ", adapted.empty() ? "" : *adapted.begin(), " but not its weight");
  return static_cast<int64_t>(std::erase_if(weights.tensors, [](const NamedTensor& t) { return is_lora_factor(t.name); })) / 2;
}

std::string write_merged(const std::string& checkpoint, WeightsKind kind, const std::string& file) {
  const std::string from = weights_file(checkpoint, kind);
  const std::filesystem::path folder = std::filesystem::absolute(file).parent_path();
  check(!std::filesystem::exists(folder / "manifest.json"), file, " lies in a checkpoint, which it would damage; choose another folder");
  std::error_code ignored;
  check(!std::filesystem::equivalent(file, from, ignored), file, " is what would be merged; choose another name");
  check_can_write(file);
  SafetensorsFile weights = read_safetensors(from);
  const int64_t linears = merge_lora(weights, from);
  check(linears > 0, from, " has no factors of LoRA (lora.rank was 0): there is nothing to merge");
  RunConfig plain = config_of(weights, from);
  plain.lora = {};
  plain.train.frozen.clear(), plain.train.histograms.clear();  // globs that factors may have been all to match
  plain.optimizer.no_decay.clear();
  weights.metadata["mesa.config"] = to_yaml(plain);
  write_file_atomically(file, format_safetensors(weights.tensors, weights.metadata));
  return concat("merged LoRA's factors into ", linears, " linears of ", from, ": ", file);
}

}  // namespace mesa
