#include "mesa/nn/layers.h"

#include <cmath>

#include "mesa/base/scope.h"

namespace mesa {

Linear Linear::make(const Builder& build, const std::string& name, int64_t in, int64_t out, bool bias) {
  const Scope scope(name);
  Linear layer;
  layer.name = name;
  layer.weight = &build.param("weight", {out, in}, Init::truncated_normal(0.02), true);
  if (bias) layer.bias = &build.param("bias", {out}, Init::zeros(), false);
  return layer;
}

Var Linear::operator()(const Var& x, const Var& residual) const {
  const Scope scope(name);
  check(scale == nullptr || bias != nullptr, "a layer with LayerScale needs a bias");
  if (scale) return scaled_linear(x, *weight, *bias, *scale, out, residual);
  return linear(x, *weight, bias ? Var(*bias) : Var(), out, residual);
}

LayerNorm LayerNorm::make(const Builder& build, const std::string& name, int64_t width) {
  const Scope scope(name);
  LayerNorm layer;
  layer.name = name;
  layer.weight = &build.param("weight", {width}, Init::ones(), false);
  layer.bias = &build.param("bias", {width}, Init::zeros(), false);
  layer.out = build.compute();
  return layer;
}

Var LayerNorm::operator()(const Var& x) const {
  const Scope scope(name);
  return layer_norm(x, *weight, *bias, eps, out);
}

namespace {

/// Each dropout of a layer draws from a stream of its own, named as timm names the module.
Var scoped_dropout(const char* name, const Var& x, double p) {
  const Scope scope(name);
  return dropout(x, p);
}

/// residual + dropout(layer(x)); where nothing is dropped the layer's own product adds.
Var onto(const Var& residual, const Linear& layer, const Var& x, const char* dropout_name, double p) {
  if (!residual.defined()) return scoped_dropout(dropout_name, layer(x), p);
  if (p == 0) return layer(x, residual);
  return residual + scoped_dropout(dropout_name, layer(x), p);
}

}  // namespace

Mlp Mlp::make(const Builder& build, const std::string& name, int64_t width, int64_t hidden, double drop) {
  const Scope scope(name);
  Mlp layer;
  layer.name = name;
  layer.fc1 = Linear::make(build, "fc1", width, hidden);
  layer.fc2 = Linear::make(build, "fc2", hidden, width);
  layer.drop = drop;
  return layer;
}

Var Mlp::operator()(const Var& x, const Var& residual) const {
  const Scope scope(name);
  const auto act = [&](const Var& h) {
    const Scope scope("act");
    return gelu(h);
  };
  return onto(residual, fc2, scoped_dropout("drop1", act(fc1(x)), drop), "drop2", drop);
}

Attention Attention::make(const Builder& build, const std::string& name, int64_t width, int64_t heads, AttentionKind kind, bool qkv_bias,
                          double drop, double attn_drop) {
  check(heads > 0 && width % heads == 0, "width ", width, " does not divide by ", heads, " heads");
  check(kind == AttentionKind::explicit_ || attn_drop == 0, "dropout on attention weights needs model.attention: explicit");
  const Scope scope(name);
  Attention layer;
  layer.name = name;
  layer.heads = heads;
  layer.kind = kind;
  layer.drop = drop;
  layer.attn_drop = attn_drop;
  layer.qkv = Linear::make(build, "qkv", width, 3 * width, qkv_bias);
  layer.proj = Linear::make(build, "proj", width, width);
  return layer;
}

namespace {

/// softmax(scale q k^T) v spelled out, each op under a scope of its own so that policies can name it.
Var explicit_attention(const Var& qkv, int64_t heads, double scale_by, double attn_drop) {
  const auto [q, k, v] = split_heads(qkv, heads);  // each [B, H, N, D]
  const auto scores = [&] {
    const Scope scope("matmul1");
    return scale(matmul(q, k, true), scale_by);  // [B, H, N, N]
  };
  const auto weights = [&](const Var& s) {
    const Scope scope("softmax");
    return softmax(s);
  };
  const Var p = scoped_dropout("attn_drop", weights(scores()), attn_drop);
  const Scope scope("matmul2");
  return merge_heads(matmul(p, v));
}

}  // namespace

Var Attention::operator()(const Var& x, const Var& residual) const {
  const Scope scope(name);
  const Var packed = qkv(x);  // [B, N, 3C]
  const double scale_by = 1.0 / std::sqrt(static_cast<double>(x.dim(-1) / heads));
  const auto mixed = [&] {
    if (kind == AttentionKind::explicit_) return explicit_attention(packed, heads, scale_by, attn_drop);
    const Scope scope("attention");
    return attention(packed, heads, scale_by, kind == AttentionKind::cudnn ? kernels::AttentionBy::cudnn : kernels::AttentionBy::engine);
  };
  return onto(residual, proj, mixed(), "proj_drop", drop);
}

PatchEmbed PatchEmbed::make(const Builder& build, const std::string& name, int64_t channels, int64_t patch, int64_t width) {
  const Scope outer(name), scope("proj");
  PatchEmbed layer;
  layer.name = name;
  const double bound = 1.0 / std::sqrt(static_cast<double>(channels * patch * patch));  // PyTorch's default for convolutions
  layer.weight = &build.param("weight", {width, channels, patch, patch}, Init::uniform(bound), true);
  layer.bias = &build.param("bias", {width}, Init::uniform(bound), false);
  layer.compute = build.compute();
  layer.out = build.residual();
  return layer;
}

Var PatchEmbed::operator()(const Var& images) const {
  const Scope outer(name), scope("proj");
  return patch_embed(images, *weight, *bias, compute, out);
}

}  // namespace mesa
