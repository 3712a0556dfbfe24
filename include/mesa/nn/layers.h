// Layers: plain structs of parameters that can be called. Each opens the scope that names its parameters and its sites.
#pragma once
#include <array>
#include <optional>
#include <string>

#include "mesa/kernels/windows.h"
#include "mesa/nn/builder.h"
#include "mesa/ops/ops.h"

namespace mesa {

/// The first values of a linear.
struct LinearInit {
  Init weight = Init::truncated_normal(0.02), bias = Init::zeros();
};

/// Sites <path>:x, and those of add_lora.
struct Linear {
  std::string name;
  Param* weight = nullptr;   ///< [out, in]
  Param* bias = nullptr;     ///< [out] or null
  Param* scale = nullptr;    ///< [out] or null: LayerScale, a parameter of the block
  std::optional<DType> out;  ///< result dtype; default the input's
  std::optional<Lora> lora;  ///< where the builder's LoRA targets this linear

  static Linear make(const Builder& build, const std::string& name, int64_t in, int64_t out, bool bias = true, const LinearInit& init = {});
  /// With a residual: residual + the layer's result, in the residual's dtype.
  Var operator()(const Var& x, const Var& residual = {}) const;
};

struct LayerNorm {
  std::string name;
  Param* weight = nullptr;
  Param* bias = nullptr;
  double eps = 1e-6;
  DType out = DType::f32;

  static LayerNorm make(const Builder& build, const std::string& name, int64_t width, double eps = 1e-6);
  Var operator()(const Var& x) const;
};

/// fc2(dropout(gelu(fc1(x)))), sites <path>.fc1:x, <path>.act:x, <path>.fc2:x.
struct Mlp {
  std::string name;
  Linear fc1, fc2;
  double drop = 0;

  static Mlp make(const Builder& build, const std::string& name, int64_t width, int64_t hidden, double drop);
  Var operator()(Var x, const Var& residual = {}) const;
};

enum class AttentionKind { fused, explicit_, cudnn };

/// What every attention of a model has in common.
struct AttentionOptions {
  AttentionKind kind = AttentionKind::fused;
  bool qkv_bias = true;
  double drop = 0;       ///< after the projection
  double attn_drop = 0;  ///< of the weights; needs explicit_
};

/// Multi-head self-attention (Vaswani et al. 2017), or within windows with a bias by relative position (Liu et al. 2021). explicit_ spells
/// out matmul, softmax, matmul.
struct Attention {
  std::string name;
  int64_t heads = 1;
  AttentionOptions options;
  kernels::Windows windows;                       ///< undefined: every token sees every token
  Param* relative_position_bias_table = nullptr;  ///< [distances, heads], with windows
  Linear qkv, proj;

  static Attention make(const Builder& build, const std::string& name, int64_t width, int64_t heads, const AttentionOptions& options,
                        const kernels::Windows& windows = {});
  /// x and the residual [B, N, C] -> [B, N, C], or of the `first` tokens alone [B, first, C].
  Var operator()(Var x, const Var& residual = {}, int64_t first = 0) const;
};

/// Attention whose keys and values come from a grid made smaller by a convolution (Wang et al., ICCV 2021, "Pyramid vision transformer").
struct ReducedAttention {
  std::string name;
  int64_t heads = 1;
  int64_t height = 0, width = 0;  ///< of the grid; unused where nothing is reduced
  double drop = 0;                ///< after the projection
  Linear q, kv, proj;
  Param *reduce_weight = nullptr, *reduce_bias = nullptr;  ///< [C, C, r, r], named <name>.sr.weight; null: keys of all tokens
  LayerNorm norm;                                          ///< of the reduced tokens
  DType compute = DType::f32;

  static ReducedAttention make(const Builder& build, const std::string& name, int64_t channels, int64_t heads, int64_t height,
                               int64_t width, int64_t reduction, bool qkv_bias, double drop);
  /// x and the residual [B, N, C] -> [B, N, C], or of the `first` tokens alone [B, first, C].
  Var operator()(Var x, const Var& residual = {}, int64_t first = 0) const;
};

/// Pre-norm block: h = x + attn(norm1(x)); h + mlp(norm2(h)).
template <class AttentionLayer>
struct Block {
  std::string name;
  int64_t heads;
  double drop_path;
  LayerNorm norm1, norm2;
  AttentionLayer attn;
  Mlp mlp;
  /// [B, N, C] -> [B, N, C]. Where nobody reads more than the `first` tokens (0: all are read), what works token by token, which is all
  /// behind the attention, is spared for the others: [B, first, C], the same values.
  Var operator()(Var x, int64_t first = 0) const;
};
using EncoderBlock = Block<Attention>;

/// Of images, or of the tokens of a grid.
struct PatchEmbed {
  std::string name;
  Param* weight = nullptr;  ///< [C, channels, p, p], named <name>.proj.weight as in timm
  Param* bias = nullptr;
  DType compute = DType::f32, out = DType::f32;

  static PatchEmbed make(const Builder& build, const std::string& name, int64_t channels, int64_t patch, int64_t width);
  Var operator()(const Var& images) const;                                 ///< [B, channels, H, W] -> [B, N, C]
  Var operator()(const Var& tokens, int64_t height, int64_t width) const;  ///< [B, height width, channels] -> [B, N, C]
};

}  // namespace mesa
