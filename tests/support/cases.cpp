#include "support/cases.h"

#include <cmath>

#include "mesa/base/scope.h"
#include "mesa/kernels/elementwise.h"
#include "mesa/nn/lora.h"

namespace mesa::testing {
namespace {

using Vars = std::vector<Var>;

Tensor labels(const std::vector<int64_t>& values) {
  return Tensor::from<int64_t>({static_cast<int64_t>(values.size())}, values, MemoryKind::inputs);
}

Tensor beside(const Var& x, const Tensor& labels) {
  return x.value().is_meta() ? labels : to(labels, x.value().device(), MemoryKind::inputs);
}

/// Runs f one scope further down, as a layer does, so that every site of a chain has a name of its own.
template <class F>
Var within(const char* name, const F& f) {
  const Scope scope(name);
  return f();
}

/// softmax(scale q k^T) v op by op, as the layer with model.attention: explicit does.
Var attention_chain(const Var& qkv, int64_t heads) {
  const auto [q, k, v] = split_heads(qkv, heads);
  const double s = 1.0 / std::sqrt(static_cast<double>(q.dim(3)));
  const Var scores = within("matmul1", [&, &q = q, &k = k] { return scale(matmul(q, k, true), s); });
  const Var p = within("softmax", [&] { return softmax(scores); });
  return within("matmul2", [&, &v = v] { return merge_heads(matmul(p, v)); });
}

/// x + fc2(gelu(fc1(norm(x)))): v = x, gamma, beta, w1, b1, w2, b2.
Var mlp_block(Vars& v) {
  const Var n = within("norm", [&] { return layer_norm(v[0], v[1], v[2], 1e-6); });
  const Var h = within("fc1", [&] { return linear(n, v[3], v[4]); });
  const Var a = within("act", [&] { return gelu(h); });
  return v[0] + within("fc2", [&] { return linear(a, v[5], v[6]); });
}

void arithmetic(std::vector<Case>& t) {
  t.push_back({"add", {normal(2, 5, 8), normal(2, 5, 8)}, [](Vars& v) { return v[0] + v[1]; }});
  t.push_back({"add", {normal(1, 1, 1), normal(1, 1, 1)}, [](Vars& v) { return v[0] + v[1]; }});
  t.push_back({"add twice the same", {normal(3, 7)}, [](Vars& v) { return v[0] + v[0]; }});
  t.push_back({"add of a shared gradient", {normal(3, 7), normal(3, 7)}, [](Vars& v) { return (v[0] + v[1]) + v[0]; }});
  t.push_back({"mul", {normal(2, 5, 8), normal(2, 5, 8)}, [](Vars& v) { return mul(v[0], v[1]); }});
  t.push_back({"mul", {normal(17), normal(17)}, [](Vars& v) { return mul(v[0], v[1]); }});
  t.push_back({"mul by a parameter", {normal(3, 4), weight(3, 4)}, [](Vars& v) { return mul(v[0], v[1]); }, false});
  t.push_back({"mul by itself", {normal(3, 5)}, [](Vars& v) { return mul(v[0], v[0]); }});
  t.push_back({"scale", {normal(3, 1, 9)}, [](Vars& v) { return scale(v[0], -1.75); }});
  t.push_back({"bias", {normal(2, 5, 8), weight(8)}, [](Vars& v) { return bias(v[0], v[1]); }});
  t.push_back({"bias", {normal(3, 5, 7), weight(1, 5, 7)}, [](Vars& v) { return bias(v[0], v[1]); }});
  t.push_back({"bias", {normal(1, 1, 33), weight(1, 1, 33)}, [](Vars& v) { return bias(v[0], v[1]); }});
}

void products(std::vector<Case>& t) {
  const auto with_bias = [](Vars& v) { return linear(v[0], v[1], v[2]); };
  t.push_back({"linear", {normal(2, 5, 8), weight(3, 8), weight(3)}, with_bias});
  t.push_back({"linear", {normal(1, 1, 7), weight(5, 7), weight(5)}, with_bias});
  t.push_back({"linear", {normal(6, 9), weight(4, 9), weight(4)}, with_bias});
  t.push_back({"linear", {normal(1), weight(1, 1), weight(1)}, with_bias});
  t.push_back({"linear", {normal(2, 3, 2, 5), weight(7, 5), weight(7)}, with_bias});
  t.push_back({"linear", {normal(4, 33, 48), weight(65, 48), weight(65)}, with_bias});
  t.push_back({"linear without bias", {normal(2, 5, 8), weight(3, 8)}, [](Vars& v) { return linear(v[0], v[1]); }});
  const auto onto = [](Vars& v) { return linear(v[0], v[1], v[2], {}, v[3]); };
  t.push_back({"linear onto a residual", {normal(2, 5, 8), weight(3, 8), weight(3), normal(2, 5, 3)}, onto});
  t.push_back({"linear onto a residual", {normal(1, 33), weight(65, 33), weight(65), normal(1, 65)}, onto});
  t.push_back({"linear onto its own input", {normal(4, 6), weight(6, 6)}, [](Vars& v) { return linear(v[0], v[1], {}, {}, v[0]); }});
  const auto scaled = [](Vars& v) { return scaled_linear(v[0], v[1], v[2], v[3], {}, v.size() > 4 ? v[4] : Var()); };
  t.push_back({"scaled_linear", {normal(2, 5, 8), weight(3, 8), weight(3), weight(3)}, scaled});
  t.push_back({"scaled_linear", {normal(1, 1), weight(1, 1), weight(1), weight(1)}, scaled});
  t.push_back({"scaled_linear onto a residual", {normal(4, 33, 16), weight(9, 16), weight(9), weight(9), normal(4, 33, 9)}, scaled});
  const auto frozen = [](Input input) {
    input.role = Input::Role::frozen;
    return input;
  };
  const Input x = normal(3, 6), w = weight(4, 6), b = weight(4), g = weight(4);
  t.push_back({"scaled_linear, gamma alone learns", {x, frozen(w), frozen(b), g}, scaled});
  t.push_back({"scaled_linear, w alone learns", {x, w, frozen(b), frozen(g)}, scaled});
  t.push_back({"scaled_linear, b alone learns", {x, frozen(w), b, frozen(g)}, scaled});
  t.push_back({"scaled_linear, nothing learns", {x, frozen(w), frozen(b), frozen(g)}, scaled});
  t.push_back({"scaled_linear used twice", {normal(3, 6), weight(6, 6), weight(6), weight(6)}, [](Vars& v) {
                 const Var h = within("first", [&] { return scaled_linear(v[0], v[1], v[2], v[3]); });
                 return within("second", [&] { return scaled_linear(h, v[1], v[2], v[3]); });
               }});
  t.push_back({"linear used twice", {normal(2, 3, 6), weight(6, 6), weight(6)}, [](Vars& v) {
                 const Var h = within("first", [&] { return linear(v[0], v[1], v[2]); });
                 return within("second", [&] { return linear(h, v[1], v[2]); });
               }});
  const auto plain = [](Vars& v) { return matmul(v[0], v[1]); };
  const auto transposed = [](Vars& v) { return matmul(v[0], v[1], true); };
  t.push_back({"matmul", {normal(4, 5), normal(5, 3)}, plain});
  t.push_back({"matmul", {normal(1, 1), normal(1, 1)}, plain});
  t.push_back({"matmul", {normal(3, 2, 7), normal(3, 7, 5)}, plain});
  t.push_back({"matmul", {normal(2, 3, 5, 4), normal(2, 3, 4, 5)}, plain});
  t.push_back({"matmul transposed", {normal(4, 5), normal(3, 5)}, transposed});
  t.push_back({"matmul transposed", {normal(2, 1, 5, 4), normal(2, 1, 7, 4)}, transposed});
  t.push_back({"matmul transposed", {normal(1, 2, 1, 3), normal(1, 2, 1, 3)}, transposed});
  t.push_back({"matmul transposed", {normal(2, 3, 33, 16), normal(2, 3, 33, 16)}, transposed});
  t.push_back({"matmul by itself", {normal(2, 4, 3)}, [](Vars& v) { return matmul(v[0], v[0], true); }});
}

/// A frozen linear with LoRA's factors: v = x, w, b, factors a and b, and perhaps LayerScale's gamma or a residual.
void lora_rows(std::vector<Case>& t) {
  const auto frozen = [](auto... dims) { return Input{Input::Role::frozen, Input::Fill::normal, {dims...}}; };
  const auto adapted = [](Vars& v) { return add_lora(linear(v[0], v[1], v[2]), v[0], v[3], v[4], 0.75); };
  const Input w = frozen(5, 8), b = frozen(5);
  t.push_back({"lora", {normal(2, 5, 8), w, b, weight(2, 8), weight(5, 2)}, adapted});
  t.push_back({"lora", {normal(1, 1), frozen(1, 1), frozen(1), weight(1, 1), weight(1, 1)}, adapted});
  t.push_back({"lora", {normal(4, 33, 48), frozen(65, 48), frozen(65), weight(8, 48), weight(65, 8)}, adapted});
  t.push_back({"lora of a trained linear", {normal(3, 8), weight(5, 8), weight(5), weight(2, 8), weight(5, 2)}, adapted});
  t.push_back({"lora with dropout", {normal(2, 5, 8), w, b, weight(2, 8), weight(5, 2)}, [](Vars& v) {
                 return add_lora(linear(v[0], v[1], v[2]), v[0], v[3], v[4], 2, 0.3);
               }});
  t.push_back({"lora onto a residual", {normal(2, 5, 8), w, b, weight(2, 8), weight(5, 2), normal(2, 5, 5)}, [](Vars& v) {
                 return add_lora(linear(v[0], v[1], v[2], {}, v[5]), v[0], v[3], v[4], 1);
               }});
  for (const bool learns : {false, true})
    t.push_back({learns ? "lora with a trained LayerScale" : "lora with LayerScale",
                 {normal(2, 5, 8), w, b, weight(2, 8), weight(5, 2), learns ? weight(5) : frozen(5)},
                 [](Vars& v) { return add_lora(scaled_linear(v[0], v[1], v[2], v[5]), v[0], v[3], v[4], 0.75, 0, v[5]); }});
  t.push_back({"lora behind a norm", {spread(2, 5, 8), frozen(8), frozen(8), w, b, weight(2, 8), weight(5, 2)}, [](Vars& v) {
                 const Var n = within("norm", [&] { return layer_norm(v[0], v[1], v[2], 1e-6); });
                 return within("fc", [&] { return add_lora(linear(n, v[3], v[4]), n, v[5], v[6], 0.5); });
               }});
}

void attention_rows(std::vector<Case>& t) {
  struct Size {
    int64_t B, N, C, H;
  };
  for (const auto [B, N, C, H] : {Size{2, 5, 6, 3}, Size{1, 7, 4, 1}, Size{3, 1, 8, 2}, Size{1, 1, 3, 1}, Size{2, 3, 4, 4},
                                  Size{3, 33, 32, 2}, Size{1, 17, 64, 2}, Size{1, 5, 64, 1}}) {
    const double s = 1.0 / std::sqrt(static_cast<double>(C / H));
    const int64_t heads = H;
    t.push_back({"attention", {normal(B, N, 3 * C)}, [heads, s](Vars& v) {
                   const Scope scope("", heads);
                   return attention(v[0], heads, s);
                 }});
    t.push_back({"attention op by op", {normal(B, N, 3 * C)}, [heads](Vars& v) {
                   const Scope scope("", heads);
                   return attention_chain(v[0], heads);
                 }});
    t.push_back({"split_heads", {normal(B, N, 3 * C)}, [heads](Vars& v) -> Outputs { return split_heads(v[0], heads); }});
    t.push_back(
        {"split_heads, one of three used", {normal(B, N, 3 * C)}, [heads](Vars& v) -> Outputs { return split_heads(v[0], heads)[1]; }});
    t.push_back({"merge_heads", {normal(B, heads, N, C / heads)}, [](Vars& v) { return merge_heads(v[0]); }});
  }
  for (const auto& [B, N, M, C, H] : {std::array<int64_t, 5>{2, 5, 3, 6, 3}, {1, 1, 4, 4, 1}, {2, 33, 1, 8, 2}, {1, 70, 17, 64, 1}}) {
    const int64_t heads = H;
    t.push_back({"attention to other tokens", {normal(B, N, C), normal(B, M, 2 * C)}, [heads](Vars& v) {
                   const Scope scope("", heads);
                   return attention(v[0], v[1], heads, 0.6);
                 }});
  }
  t.push_back({"attention to its own projection", {normal(2, 4, 6), weight(12, 6)}, [](Vars& v) {
                 const Scope scope("", 2);
                 const Var kv = within("kv", [&] { return linear(v[0], v[1]); });
                 return within("attention", [&] { return attention(v[0], kv, 2, 0.6); });
               }});
  t.push_back({"attention and projection", {normal(2, 5, 12), weight(3, 4), weight(3)}, [](Vars& v) {
                 const Scope scope("", 2);
                 const Var o = within("attention", [&] { return attention(v[0], 2, 0.7); });
                 return within("proj", [&] { return linear(o, v[1], v[2]); });
               }});
}

kernels::Windows windows(int height, int width, int window_height, int window_width, int shift_y, int shift_x, int inner_height = 0,
                         int inner_width = 0) {
  return {height,
          width,
          window_height,
          window_width,
          shift_y,
          shift_x,
          inner_height ? inner_height : height,
          inner_width ? inner_width : width};
}

void window_rows(std::vector<Case>& t) {
  struct Size {
    int64_t B, D, H;
    kernels::Windows w;
  };
  for (const auto& [B, D, H, w] : {Size{2, 2, 3, windows(4, 6, 2, 3, 1, 1)}, Size{1, 4, 1, windows(4, 4, 4, 4, 0, 0)},
                                   Size{2, 1, 2, windows(3, 6, 3, 2, 0, 1)}, Size{1, 3, 2, windows(6, 6, 3, 3, 1, 2, 5, 4)},
                                   Size{1, 32, 1, windows(7, 14, 7, 7, 3, 3)}, Size{2, 2, 1, windows(1, 2, 1, 1, 0, 0)}}) {
    const int64_t N = w.tokens(), C = H * D, heads = H, n = w.length();
    const double s = 1.0 / std::sqrt(static_cast<double>(D));
    t.push_back({"window_attention", {normal(B, N, 3 * C), weight(w.distances(), H)}, [heads, s, w = w](Vars& v) {
                   const Scope scope("", heads);
                   return window_attention(v[0], v[1], heads, s, w);
                 }});
    t.push_back({"window_attention op by op", {normal(B, N, 3 * C), weight(w.distances(), H)}, [heads, w = w](Vars& v) {
                   const Scope scope("", heads);
                   const auto [q, k, x] = split_heads(to_windows(v[0], w), heads);
                   const double s = 1.0 / std::sqrt(static_cast<double>(q.dim(3)));
                   const Var scores = within("matmul1", [&, &q = q, &k = k] { return scale(matmul(q, k, true), s); });
                   const Var p = within("softmax", [&] { return softmax(window_bias(scores, v[1], w)); });
                   return from_windows(within("matmul2", [&, &x = x] { return merge_heads(matmul(p, x)); }), w);
                 }});
    t.push_back({"to_windows", {normal(B, N, C)}, [w = w](Vars& v) { return to_windows(v[0], w); }});
    t.push_back({"from_windows", {normal(B * w.count(), n, C)}, [w = w](Vars& v) { return from_windows(v[0], w); }});
  }
  t.push_back({"window_attention, frozen table", {normal(1, 16, 6), {Input::Role::frozen, Input::Fill::normal, {9, 1}}}, [](Vars& v) {
                 return window_attention(v[0], v[1], 1, 0.6, windows(4, 4, 2, 2, 1, 1));
               }});
  t.push_back({"window_attention used twice", {normal(1, 4, 6), weight(9, 1)}, [](Vars& v) {
                 const Var first = within("first", [&] { return window_attention(v[0], v[1], 1, 0.6, windows(2, 2, 2, 2, 0, 0)); });
                 const Var second = within("second", [&] { return window_attention(v[0], v[1], 1, 0.4, windows(2, 2, 2, 2, 0, 0)); });
                 return first + second;
               }});
  t.push_back({"merge_patches", {normal(2, 24, 3)}, [](Vars& v) { return merge_patches(v[0], 4, 6); }});
  t.push_back({"merge_patches", {normal(1, 4, 1)}, [](Vars& v) { return merge_patches(v[0], 2, 2); }});
  t.push_back({"pad_grid", {normal(2, 6, 3)}, [](Vars& v) { return pad_grid(v[0], 2, 3, 3, 5); }});
  t.push_back({"pad_grid of normalized tokens", {spread(1, 6, 4), weight(4), weight(4), weight(2, 4)}, [](Vars& v) {
                 const Var y = within("norm", [&] { return layer_norm(v[0], v[1], v[2], 1e-5); });
                 return within("fc", [&] { return linear(pad_grid(y, 3, 2, 4, 3), v[3]); });
               }});
  t.push_back({"crop_grid", {normal(2, 15, 3)}, [](Vars& v) { return crop_grid(v[0], 3, 5, 2, 3); }});
}

void normalization(std::vector<Case>& t) {
  const auto norm = [](Vars& v) { return layer_norm(v[0], v[1], v[2], 1e-6); };
  t.push_back({"layer_norm", {spread(2, 5, 8), weight(8), weight(8)}, norm});
  t.push_back({"layer_norm", {normal(1, 1, 13), weight(13), weight(13)}, norm});
  t.push_back({"layer_norm", {spread(3, 2), weight(2), weight(2)}, norm});
  t.push_back({"layer_norm", {normal(4, 33, 48), weight(48), weight(48)}, norm});
  for (const Shape& s : {Shape{2, 3, 5, 5}, Shape{1, 1, 1, 1}, Shape{4, 7}, Shape{1, 3, 1}, Shape{2, 3, 33, 33}})
    t.push_back({"softmax", {{Input::Role::activation, Input::Fill::normal, s}}, [](Vars& v) { return softmax(v[0]); }});
  for (const Shape& s : {Shape{2, 5, 8}, Shape{1, 1, 1}, Shape{3, 7}, Shape{4, 33, 48}}) {
    t.push_back({"gelu", {{Input::Role::activation, Input::Fill::normal, s}}, [](Vars& v) { return gelu(v[0]); }});
    t.push_back({"relu", {{Input::Role::activation, Input::Fill::away_from_zero, s}}, [](Vars& v) { return relu(v[0]); }});
    t.push_back({"dropout", {{Input::Role::activation, Input::Fill::normal, s}}, [](Vars& v) { return dropout(v[0], 0.3); }});
    const Input activation{Input::Role::activation, Input::Fill::normal, s}, frozen{Input::Role::frozen, Input::Fill::normal, s};
    const auto dropped = [](Vars& v) { return add_drop_path(v[0], v[1], 0.4); };
    t.push_back({"add_drop_path", {activation, activation}, dropped});
    t.push_back({"add_drop_path, x frozen", {frozen, activation}, dropped});
    t.push_back({"add_drop_path, branch frozen", {activation, frozen}, dropped});
    t.push_back({"add_drop_path onto itself", {activation}, [](Vars& v) { return add_drop_path(v[0], v[0], 0.4); }});
  }
  t.push_back({"dropout by nothing", {normal(2, 3)}, [](Vars& v) { return dropout(add_drop_path(v[0], v[0], 0), 0); }});
  t.push_back({"mlp block", {spread(2, 3, 6), weight(6), weight(6), weight(9, 6), weight(9), weight(6, 9), weight(6)}, mlp_block});
}

void convolutions(std::vector<Case>& t) {
  const auto conv = [](const kernels::ConvGeometry& g) {
    return [=](Vars& v) { return conv2d(v[0], v[1], v.size() > 2 ? v[2] : Var(), g, v[0].dtype()); };
  };
  t.push_back({"conv2d", {normal(2, 20, 3), weight(4, 3, 3, 3), weight(4)}, conv({5, 4, 3, 3, 1, 1})});
  t.push_back({"conv2d without bias", {normal(2, 35, 2), weight(3, 2, 3, 3)}, conv({5, 7, 3, 3, 2, 1})});
  t.push_back({"conv2d of stride 3", {normal(1, 40, 2), weight(2, 2, 2, 3)}, conv({8, 5, 2, 3, 3, 1})});
  t.push_back({"conv2d of 1 x 1", {normal(2, 6, 4), weight(5, 4, 1, 1), weight(5)}, conv({2, 3})});
  t.push_back({"conv2d of 1 x 1, every second", {normal(2, 15, 4), weight(3, 4, 1, 1)}, conv({5, 3, 1, 1, 2})});
  t.push_back({"conv2d dilated", {normal(1, 30, 2), weight(3, 2, 3, 3), weight(3)}, conv({6, 5, 3, 3, 1, 2, 2})});
  t.push_back({"conv2d in groups", {normal(2, 12, 6), weight(4, 3, 3, 3), weight(4)}, conv({4, 3, 3, 3, 1, 1, 1, 2})});
  t.push_back({"conv2d depthwise", {normal(1, 20, 4), weight(4, 1, 3, 3), weight(4)}, conv({4, 5, 3, 3, 2, 1, 1, 4})});
  t.push_back({"conv2d depthwise, two results each", {normal(1, 9, 3), weight(6, 1, 3, 3)}, conv({3, 3, 3, 3, 1, 1, 1, 3})});
  t.push_back({"conv2d larger than the grid", {normal(1, 1, 3), weight(2, 3, 3, 3)}, conv({1, 1, 3, 3, 2, 1})});
  t.push_back({"conv2d", {normal(3, 143, 16), weight(24, 16, 3, 3)}, conv({11, 13, 3, 3, 2, 1})});
  t.push_back({"conv2d of images", {normal(2, 3, 6, 5), weight(4, 3, 3, 3), weight(4)}, conv({6, 5, 3, 3, 2, 1})});
  t.push_back({"conv2d of images", {normal(1, 1, 9, 9), weight(2, 1, 7, 7)}, conv({9, 9, 7, 7, 2, 3})});
  t.push_back({"conv2d of a frozen weight",
               {normal(1, 12, 2), {Input::Role::frozen, Input::Fill::normal, {3, 2, 3, 3}}},
               conv({3, 4, 3, 3, 1, 1})});
  t.push_back({"conv2d used twice", {normal(1, 12, 2), weight(2, 2, 3, 3)}, [](Vars& v) {
                 const Var first = within("first", [&] { return conv2d(v[0], v[1], {}, {3, 4, 3, 3, 1, 1}, v[0].dtype()); });
                 return within("second", [&] { return conv2d(first, v[1], {}, {3, 4, 3, 3, 1, 1}, v[0].dtype()); });
               }});
  const auto pool = [](const kernels::ConvGeometry& g) { return [=](Vars& v) { return max_pool2d(v[0], g); }; };
  t.push_back({"max_pool2d", {distinct(2, 35, 3)}, pool({5, 7, 3, 3, 2, 1})});
  t.push_back({"max_pool2d", {distinct(1, 24, 8)}, pool({4, 6, 2, 2, 2})});
  t.push_back({"max_pool2d", {distinct(1, 1, 1)}, pool({1, 1, 3, 3, 2, 1})});
}

/// Running statistics that a batch norm may move.
RunningStatistics running(const Var& gamma) {
  RunningStatistics r{empty_like(gamma.value()), empty_like(gamma.value()), 0.1};
  kernels::fill(r.mean, 0.25), kernels::fill(r.var, 1.5);
  return r;
}

void batch_norms(std::vector<Case>& t) {
  const auto norm = [](Vars& v) { return batch_norm(v[0], v[1], v[2], running(v[1]), 1e-5); };
  t.push_back({"batch_norm", {spread(2, 6, 5), weight(5), weight(5)}, norm});
  t.push_back({"batch_norm", {spread(2, 1, 3), weight(3), weight(3)}, norm});
  t.push_back({"batch_norm", {spread(1, 12, 1), weight(1), weight(1)}, norm});
  t.push_back({"batch_norm", {spread(3, 45, 24), weight(24), weight(24)}, norm});
  const Input frozen{Input::Role::frozen, Input::Fill::normal, {4}};
  t.push_back({"batch_norm, frozen", {spread(2, 3, 4), frozen, frozen}, norm});
  t.push_back({"batch_norm, beta alone learns", {spread(2, 3, 4), frozen, weight(4)}, norm});
  t.push_back({"batch_norm of a constant", {{Input::Role::constant, Input::Fill::spread, {2, 3, 4}}, weight(4), weight(4)}, norm});
  const auto normalized = [](Vars& v) {
    const Var h = within("conv1", [&] { return conv2d(v[0], v[1], {}, {4, 3, 3, 3, 1, 1}, v[0].dtype()); });
    return within("bn1", [&] { return batch_norm(h, v[2], v[3], running(v[2]), 1e-5); });
  };
  t.push_back({"residual block",
               {spread(1, 12, 3), weight(3, 3, 3, 3), weight(3), weight(3), weight(3, 3, 3, 3)},
               [normalized](Vars& v) {
                 const Var n = normalized(v);
                 const Var a = within("act1", [&] { return relu(n); });
                 return v[0] + within("conv2", [&] { return conv2d(a, v[4], {}, {4, 3, 3, 3, 1, 1}, v[0].dtype()); });
               },
               true,
               normalized});
}

void tokens(std::vector<Case>& t) {
  const auto patches = [](Vars& v) { return patch_embed(v[0], v[1], v[2], v[0].dtype(), v[0].dtype()); };
  t.push_back({"patch_embed", {normal(2, 3, 8, 8), weight(5, 3, 4, 4), weight(5)}, patches});
  t.push_back({"patch_embed", {normal(1, 1, 6, 4), weight(3, 1, 2, 2), weight(3)}, patches});
  t.push_back({"patch_embed", {normal(3, 2, 3, 3), weight(1, 2, 3, 3), weight(1)}, patches});
  const auto conv = [](int64_t height, int64_t width) {
    return [=](Vars& v) { return patch_conv(v[0], height, width, v[1], v[2], v[0].dtype(), v[0].dtype()); };
  };
  t.push_back({"patch_conv", {normal(2, 24, 3), weight(5, 3, 2, 2), weight(5)}, conv(4, 6)});
  t.push_back({"patch_conv", {normal(1, 9, 1), weight(1, 1, 3, 3), weight(1)}, conv(3, 3)});
  t.push_back({"patch_conv", {normal(2, 6, 4), weight(3, 4, 1, 1), weight(3)}, conv(2, 3)});
  t.push_back({"patch_conv used twice",
               {normal(1, 16, 2), weight(2, 2, 2, 2), weight(2)},
               [](Vars& v) {
                 const Var first = within("first", [&] { return patch_conv(v[0], 4, 4, v[1], v[2], v[0].dtype(), v[0].dtype()); });
                 return within("second", [&] { return patch_conv(first, 2, 2, v[1], v[2], v[0].dtype(), v[0].dtype()); });
               },
               false});  // in bf16 the first result's rounding counts as often as the second has terms
  const auto prepend = [](Vars& v) { return prepend_tokens({v.begin() + 1, v.end()}, v[0]); };
  t.push_back({"prepend_tokens", {normal(2, 5, 8), weight(1, 1, 8)}, prepend});
  t.push_back({"prepend_tokens", {normal(1, 1, 3), weight(1, 1, 3)}, prepend});
  t.push_back({"prepend_tokens", {normal(3, 4, 7), weight(1, 1, 7), weight(1, 1, 7), weight(1, 4, 7)}, prepend});
  t.push_back({"prepend_tokens, one twice", {normal(2, 1, 5), weight(1, 2, 5)}, [](Vars& v) {
                 return prepend_tokens({v[1], v[1]}, v[0]);
               }});
  t.push_back({"first_tokens", {normal(3, 4, 7)}, [](Vars& v) { return first_tokens(v[0], 2); }});
  t.push_back({"select_token of normalized ones", {spread(2, 5, 8), weight(8), weight(8), weight(3, 8)}, [](Vars& v) {
                 const Var y = within("norm", [&] { return layer_norm(v[0], v[1], v[2], 1e-6); });
                 return within("head", [&] { return linear(select_token(y, 1), v[3]); });
               }});
  t.push_back({"select_token", {normal(2, 5, 8)}, [](Vars& v) { return select_token(v[0], 0); }});
  t.push_back({"select_token", {normal(3, 4, 7)}, [](Vars& v) { return select_token(v[0], 3); }});
  t.push_back({"select_token", {normal(1, 1, 1)}, [](Vars& v) { return select_token(v[0], 0); }});
  t.push_back({"mean_pool", {normal(2, 5, 8)}, [](Vars& v) { return mean_pool(v[0], 0); }});
  t.push_back({"mean_pool", {normal(3, 4, 7)}, [](Vars& v) { return mean_pool(v[0], 1); }});
  t.push_back({"mean_pool of normalized tokens", {spread(2, 5, 8), weight(8), weight(8), weight(3, 8)}, [](Vars& v) {
                 const Var y = within("norm", [&] { return layer_norm(v[0], v[1], v[2], 1e-6); });
                 return within("head", [&] { return linear(mean_pool(y, 1), v[3]); });
               }});
  t.push_back({"mean_pool", {normal(1, 1, 5)}, [](Vars& v) { return mean_pool(v[0], 0); }});
}

void losses(std::vector<Case>& t) {
  const Tensor three = labels({4, 0, 2}), one = labels({1});
  t.push_back({"cross_entropy", {normal(3, 5)}, [three](Vars& v) { return cross_entropy(v[0], beside(v[0], three)); }, false});
  t.push_back(
      {"cross_entropy smoothed", {normal(3, 5)}, [three](Vars& v) { return cross_entropy(v[0], beside(v[0], three), 0.1); }, false});
  t.push_back({"cross_entropy", {normal(1, 2)}, [one](Vars& v) { return cross_entropy(v[0], beside(v[0], one), 0.3); }, false});
  t.push_back({"cross_entropy soft", {normal(4, 7), distribution(4, 7)}, [](Vars& v) { return cross_entropy(v[0], v[1]); }, false});
  t.push_back(
      {"binary_cross_entropy", {normal(4, 7), distribution(4, 7)}, [](Vars& v) { return binary_cross_entropy(v[0], v[1]); }, false});
  t.push_back(
      {"binary_cross_entropy", {normal(1, 1), distribution(1, 1)}, [](Vars& v) { return binary_cross_entropy(v[0], v[1]); }, false});
}

/// LayerScale's gamma goes into the weight; fused attention hands its probabilities to the product with v in bf16.
std::vector<Case::Inside> rounded_inside(const Case& row) {
  const auto has = [&](const char* words) { return row.name.find(words) != std::string::npos; };
  if (row.name.starts_with("scaled_linear") || has("LayerScale")) return {{1}};
  if (!(row.name.starts_with("attention") || row.name.starts_with("window_attention")) || has("op by op")) return {};
  const Shape &x = row.inputs[0].shape, &last = row.inputs.back().shape;
  if (has("own projection")) return {{1, last.numel(), last.numel() / 2}};  // the rows that make v
  if (has("other tokens")) return {{1, last[-1], last[-1] / 2}};
  return {{0, x[-1], x[-1] / 3 * 2}};
}

}  // namespace

std::string Case::title() const {
  std::string text = name;
  for (const Input& input : inputs) text += " " + to_string(input.shape);
  return text;
}

const std::vector<Case>& cases() {
  static const std::vector<Case> table = [] {
    std::vector<Case> t;
    arithmetic(t);
    products(t);
    lora_rows(t);
    attention_rows(t);
    window_rows(t);
    normalization(t);
    convolutions(t);
    batch_norms(t);
    tokens(t);
    losses(t);
    for (Case& row : t) row.inside = rounded_inside(row);
    return t;
  }();
  return table;
}

}  // namespace mesa::testing
