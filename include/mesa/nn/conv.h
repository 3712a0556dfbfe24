// Layers of convolutional networks, on grids of tokens.
#pragma once
#include "mesa/nn/builder.h"
#include "mesa/ops/ops.h"

namespace mesa {

/// Sites <path>:x.
struct Conv2d {
  std::string name;
  kernels::ConvGeometry geometry;
  Param* weight = nullptr;  ///< [out, in / groups, kh, kw]
  Param* bias = nullptr;    ///< [out] or null
  DType compute = DType::f32;

  /// A square kernel's weight from a normal distribution of variance 2 / (out kh kw) (He et al., ICCV 2015, by fan-out).
  static Conv2d make(const Builder& build, const std::string& name, int64_t in, int64_t out, const kernels::ConvGeometry& geometry,
                     bool bias = false);
  /// [B, height width, in] or images [B, in, height, width] -> [B, H' W', out].
  Var operator()(const Var& x) const;
};

/// Sites <path>:xhat. Running statistics are buffers of the store, <path>.running_mean and <path>.running_var.
struct BatchNorm2d {
  std::string name;
  Param* weight = nullptr;
  Param* bias = nullptr;
  ModelBuffer* running_mean = nullptr;
  ModelBuffer* running_var = nullptr;
  double eps = 1e-5, momentum = 0.1;

  static BatchNorm2d make(const Builder& build, const std::string& name, int64_t channels, double first_weight = 1);
  Var operator()(const Var& x) const;
};

}  // namespace mesa
