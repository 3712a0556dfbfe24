#include "mesa/nn/layers.h"

#include <cmath>

#include "mesa/base/scope.h"

namespace mesa {

Linear Linear::make(const Builder& build, const std::string& name, int64_t in, int64_t out, bool bias, const LinearInit& init) {
  const Scope scope(name);
  Linear layer;
  layer.name = name;
  layer.weight = &build.param("weight", {out, in}, init.weight, true);
  if (bias) layer.bias = &build.param("bias", {out}, init.bias, false);
  layer.lora = build.lora(in, out);
  return layer;
}

Var Linear::operator()(const Var& x, const Var& residual) const {
  const Scope scope(name);
  check(scale == nullptr || bias != nullptr, "a layer with LayerScale needs a bias");
  const Var y =
      scale ? scaled_linear(x, *weight, *bias, *scale, out, residual) : linear(x, *weight, bias ? Var(*bias) : Var(), out, residual);
  return lora ? add_lora(y, x, *lora->a, *lora->b, lora->factor, lora->dropout, scale ? Var(*scale) : Var()) : y;
}

LayerNorm LayerNorm::make(const Builder& build, const std::string& name, int64_t width, double eps) {
  const Scope scope(name);
  LayerNorm layer;
  layer.name = name;
  layer.eps = eps;
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

/// Behind the attention, so that the way back begins with this gradient, to which that of the norm in front is added.
Var first_of(const Var& x, int64_t first) { return first > 0 && x.defined() ? first_tokens(x, first) : x; }

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

Var Mlp::operator()(Var x, const Var& residual) const {
  const Scope scope(name);
  Var h = fc1(x);
  x = {};
  {
    const Scope scope("act");
    h = gelu(h);
  }
  h = scoped_dropout("drop1", h, drop);
  return onto(residual, fc2, h, "drop2", drop);
}

Attention Attention::make(const Builder& build, const std::string& name, int64_t width, int64_t heads, const AttentionOptions& options,
                          const kernels::Windows& windows) {
  check(heads > 0 && width % heads == 0, "width ", width, " does not divide by ", heads, " heads");
  check(options.kind == AttentionKind::explicit_ || options.attn_drop == 0, "dropout on attention weights needs model.attention: explicit");
  check(options.kind != AttentionKind::cudnn || !windows.defined(), "model.attention: cudnn knows no windows; use fused");
  const Scope scope(name);
  Attention layer;
  layer.name = name;
  layer.heads = heads;
  layer.options = options;
  layer.windows = windows;
  if (windows.defined()) {
    layer.relative_position_bias_table =
        &build.param("relative_position_bias_table", {windows.distances(), heads}, Init::truncated_normal(0.02), false);
    layer.relative_position_bias_table->grid = {0, 2 * windows.window_height - 1, 2 * windows.window_width - 1};
  }
  layer.qkv = Linear::make(build, "qkv", width, 3 * width, options.qkv_bias);
  layer.proj = Linear::make(build, "proj", width, width);
  return layer;
}

namespace {

/// f under a scope of its own, so that policies can name its sites.
template <class F>
Var within(const char* name, const F& f) {
  const Scope scope(name);
  return f();
}

/// softmax(scale q k^T) v spelled out; `biased` may add to the scores.
template <class Biased>
Var explicit_attention(const Var& qkv, int64_t heads, double scale_by, double attn_drop, const Biased& biased) {
  const auto [q, k, v] = split_heads(qkv, heads);                                                                     // each [B, H, N, D]
  const Var scores = within("matmul1", [&, &q = q, &k = k] { return biased(scale(matmul(q, k, true), scale_by)); });  // [B, H, N, N]
  const Var weights = within("softmax", [&] { return softmax(scores); });
  const Var p = scoped_dropout("attn_drop", weights, attn_drop);
  return within("matmul2", [&, &v = v] { return merge_heads(matmul(p, v)); });
}

}  // namespace

Var Attention::operator()(Var x, const Var& residual, int64_t first) const {
  const Scope scope(name);
  const double scale_by = 1.0 / std::sqrt(static_cast<double>(x.dim(-1) / heads));
  const auto mixed = [&](const Var& packed) {  // [B, N, 3C] -> [B, N, C]
    const bool in_windows = windows.defined();
    if (options.kind == AttentionKind::explicit_) {
      if (!in_windows) return explicit_attention(packed, heads, scale_by, options.attn_drop, [](const Var& s) { return s; });
      const auto biased = [&](const Var& s) { return window_bias(s, *relative_position_bias_table, windows); };
      return from_windows(explicit_attention(to_windows(packed, windows), heads, scale_by, options.attn_drop, biased), windows);
    }
    const Scope scope("attention");
    if (in_windows) return window_attention(packed, *relative_position_bias_table, heads, scale_by, windows);
    return attention(packed, heads, scale_by,
                     options.kind == AttentionKind::cudnn ? kernels::AttentionBy::cudnn : kernels::AttentionBy::engine);
  };
  // Padding is zeros in front of the projection, as in the original: it takes part as the projection's bias.
  const int64_t h = windows.inner_height, w = windows.inner_width, H = windows.height, W = windows.width;
  const bool padded = h != H || w != W;
  if (padded) x = pad_grid(x, h, w, H, W);
  x = qkv(x);
  x = mixed(x);
  if (padded) x = crop_grid(x, H, W, h, w);
  if (first > 0) x = first_tokens(x, first);
  return onto(first_of(residual, first), proj, x, "proj_drop", options.drop);
}

ReducedAttention ReducedAttention::make(const Builder& build, const std::string& name, int64_t channels, int64_t heads, int64_t height,
                                        int64_t width, int64_t reduction, bool qkv_bias, double drop) {
  check(heads > 0 && channels % heads == 0, "width ", channels, " does not divide by ", heads, " heads");
  const Scope scope(name);
  ReducedAttention layer;
  layer.name = name;
  layer.heads = heads;
  layer.height = height, layer.width = width;
  layer.drop = drop;
  layer.compute = build.compute();
  layer.q = Linear::make(build, "q", channels, channels, qkv_bias);
  layer.kv = Linear::make(build, "kv", channels, 2 * channels, qkv_bias);
  layer.proj = Linear::make(build, "proj", channels, channels);
  if (reduction == 1) return layer;
  {
    const Scope scope("sr");
    const double bound = 1.0 / std::sqrt(static_cast<double>(channels * reduction * reduction));
    layer.reduce_weight = &build.param("weight", {channels, channels, reduction, reduction}, Init::uniform(bound), true);
    layer.reduce_bias = &build.param("bias", {channels}, Init::uniform(bound), false);
  }
  layer.norm = LayerNorm::make(build, "norm", channels, 1e-5);
  return layer;
}

Var ReducedAttention::operator()(Var x, const Var& residual, int64_t first) const {
  const Scope scope(name);
  const double scale_by = 1.0 / std::sqrt(static_cast<double>(x.dim(-1) / heads));
  const auto reduced = [&] {
    const Var smaller = within("sr", [&] { return patch_conv(x, height, width, *reduce_weight, *reduce_bias, compute, compute); });
    return norm(smaller);
  };
  Var queries = q(first > 0 ? first_tokens(x, first) : x), keys = kv(reduce_weight ? reduced() : x);
  x = within("attention", [&] { return attention(queries, keys, heads, scale_by); });
  queries = keys = {};
  return onto(first_of(residual, first), proj, x, "proj_drop", drop);
}

template <class AttentionLayer>
Var Block<AttentionLayer>::operator()(Var x, int64_t first) const {
  const Scope scope(name, heads);
  if (drop_path == 0 || Tape::current() == nullptr) {  // the last product of each branch adds
    const Var h = attn(norm1(x), x, first);
    x = {};
    return mlp(norm2(h), h);
  }
  const auto add = [&](const char* which, const Var& to, const Var& branch) {
    const Scope scope(which);  // two streams of random numbers a block
    return add_drop_path(to, branch, drop_path);
  };
  Var branch = attn(norm1(x), {}, first);
  const Var h = add("drop_path1", first_of(x, first), branch);
  x = branch = {};
  return add("drop_path2", h, mlp(norm2(h)));
}

template struct Block<Attention>;
template struct Block<ReducedAttention>;

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

Var PatchEmbed::operator()(const Var& tokens, int64_t height, int64_t width) const {
  const Scope outer(name), scope("proj");
  return patch_conv(tokens, height, width, *weight, *bias, compute, out);
}

}  // namespace mesa
