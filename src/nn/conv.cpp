#include "mesa/nn/conv.h"

#include <cmath>

#include "mesa/base/scope.h"

namespace mesa {

Conv2d Conv2d::make(const Builder& build, const std::string& name, int64_t in, int64_t out, const kernels::ConvGeometry& geometry,
                    bool bias) {
  check(geometry.groups > 0 && in % geometry.groups == 0 && out % geometry.groups == 0, "a convolution of ", in, " to ", out,
        " channels in ", geometry.groups, " groups");
  const Scope scope(name);
  Conv2d layer;
  layer.name = name;
  layer.geometry = geometry;
  layer.compute = build.compute();
  const double std = std::sqrt(2.0 / static_cast<double>(out * geometry.taps()));
  layer.weight =
      &build.param("weight", {out, in / geometry.groups, geometry.kernel_height, geometry.kernel_width}, Init::normal(std), true);
  if (bias) layer.bias = &build.param("bias", {out}, Init::zeros(), false);
  return layer;
}

Var Conv2d::operator()(const Var& x) const {
  const Scope scope(name);
  return conv2d(x, *weight, bias ? Var(*bias) : Var(), geometry, compute);
}

BatchNorm2d BatchNorm2d::make(const Builder& build, const std::string& name, int64_t channels, double first_weight) {
  const Scope scope(name);
  BatchNorm2d layer;
  layer.name = name;
  layer.weight = &build.param("weight", {channels}, Init::constant(first_weight), false);
  layer.bias = &build.param("bias", {channels}, Init::zeros(), false);
  layer.running_mean = &build.buffer("running_mean", {channels}, 0);
  layer.running_var = &build.buffer("running_var", {channels}, 1);
  return layer;
}

Var BatchNorm2d::operator()(const Var& x) const {
  const Scope scope(name);
  return batch_norm(x, *weight, *bias, {running_mean->value, running_var->value, momentum}, eps);
}

}  // namespace mesa
