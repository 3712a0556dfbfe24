#include "mesa/nn/lora.h"

#include <fnmatch.h>

#include <algorithm>
#include <cmath>

#include "mesa/base/scope.h"
#include "mesa/nn/builder.h"
#include "mesa/ops/ops.h"

namespace mesa {
namespace {

constexpr const char *kA = ".lora_A.weight", *kB = ".lora_B.weight";

template <class F>
Var within(const char* name, const F& f) {
  const Scope scope(name);
  return f();
}

}  // namespace

bool LoraOptions::hits(const std::string& path) const {
  return rank > 0 && std::any_of(targets.begin(), targets.end(),
                                 [&](const std::string& glob) { return fnmatch(glob.c_str(), path.c_str(), FNM_EXTMATCH) == 0; });
}

std::optional<Lora> Builder::lora(int64_t in, int64_t out) const {
  store_.add_linear(Scope::path());
  if (!lora_.hits(Scope::path())) return {};
  check(lora_.alpha > 0 && lora_.dropout >= 0 && lora_.dropout < 1, "LoRA with alpha ", lora_.alpha, " and dropout ", lora_.dropout);
  const auto factor = [&](const char* name, const Shape& shape, Init init) {
    const Scope scope(name);
    return &param("weight", shape, init, true);
  };
  Lora lora;
  // PEFT's kaiming_uniform_(a = sqrt(5)): a bound of sqrt(6 / ((1 + a^2) in)).
  lora.a = factor("lora_A", {lora_.rank, in}, Init::uniform(1 / std::sqrt(static_cast<double>(in))));
  lora.b = factor("lora_B", {out, lora_.rank}, Init::zeros());
  lora.factor = lora_.factor(), lora.dropout = lora_.dropout;
  return lora;
}

Var add_lora(const Var& y, const Var& x, const Var& a, const Var& b, double factor, double drop, const Var& gamma) {
  check(a.value().rank() == 2 && b.value().rank() == 2 && a.dim(0) == b.dim(1), "LoRA's factors are ", a.shape(), " and ", b.shape());
  const Var read = within("lora_dropout", [&] { return dropout(x, drop); });
  const Var h = within("lora_A", [&] { return linear(read, a); });  // [.., r]
  const Scope scope("lora_B", 1);                                   // whose input belongs to no attention heads
  const Var scaled = factor == 1 ? h : scale(h, factor);
  if (!gamma.defined()) return linear(scaled, b, {}, {}, y);
  return scaled_linear(scaled, b, Var(Tensor::zeros(gamma.shape(), gamma.dtype(), gamma.value().device())), gamma, {}, y);
}

bool is_lora_factor(const std::string& parameter) { return parameter.ends_with(kA) || parameter.ends_with(kB); }

std::string linear_of(const std::string& parameter) {
  const std::string path = parameter.substr(0, parameter.rfind('.'));
  return is_lora_factor(parameter) ? path.substr(0, path.rfind('.')) : path;
}

std::set<std::string> adapted_linears(const ParamStore& params) {
  std::set<std::string> paths;
  for (const Param& param : params.params())
    if (is_lora_factor(param.name)) paths.insert(linear_of(param.name));
  return paths;
}

}  // namespace mesa
