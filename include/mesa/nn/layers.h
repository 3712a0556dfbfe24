// Layers: plain structs of parameters that can be called. Each opens the scope that names its parameters and its sites.
#pragma once
#include <array>
#include <optional>
#include <string>

#include "mesa/nn/builder.h"
#include "mesa/ops/ops.h"

namespace mesa {

struct Linear {
  std::string name;
  Param* weight = nullptr;  ///< [out, in]
  Param* bias = nullptr;    ///< [out] or null
  Param* scale = nullptr;   ///< [out] or null: LayerScale, a parameter of the block
  std::optional<DType> out;  ///< result dtype; default the input's

  static Linear make(const Builder& build, const std::string& name, int64_t in, int64_t out, bool bias = true);
  /// With a residual: residual + the layer's result, in the residual's dtype.
  Var operator()(const Var& x, const Var& residual = {}) const;
};

struct LayerNorm {
  std::string name;
  Param* weight = nullptr;
  Param* bias = nullptr;
  double eps = 1e-6;
  DType out = DType::f32;

  static LayerNorm make(const Builder& build, const std::string& name, int64_t width);
  Var operator()(const Var& x) const;
};

/// fc2(dropout(gelu(fc1(x)))), sites <path>.fc1:x, <path>.act:x, <path>.fc2:x.
struct Mlp {
  std::string name;
  Linear fc1, fc2;
  double drop = 0;

  static Mlp make(const Builder& build, const std::string& name, int64_t width, int64_t hidden, double drop);
  Var operator()(const Var& x, const Var& residual = {}) const;
};

enum class AttentionKind { fused, explicit_, cudnn };

/// Multi-head self-attention (Vaswani et al. 2017). explicit_ spells out matmul, softmax, matmul.
struct Attention {
  std::string name;
  int64_t heads = 1;
  AttentionKind kind = AttentionKind::fused;
  double drop = 0, attn_drop = 0;
  Linear qkv, proj;

  static Attention make(const Builder& build, const std::string& name, int64_t width, int64_t heads, AttentionKind kind, bool qkv_bias,
                        double drop, double attn_drop);
  Var operator()(const Var& x, const Var& residual = {}) const;  ///< x [B, N, C] -> [B, N, C]
};

struct PatchEmbed {
  std::string name;
  Param* weight = nullptr;  ///< [C, channels, p, p], named <name>.proj.weight as in timm
  Param* bias = nullptr;
  DType compute = DType::f32, out = DType::f32;

  static PatchEmbed make(const Builder& build, const std::string& name, int64_t channels, int64_t patch, int64_t width);
  Var operator()(const Var& images) const;  ///< [B, channels, H, W] -> [B, N, C]
};

}  // namespace mesa
