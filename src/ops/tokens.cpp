#include "gradients.h"
#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/image.h"
#include "mesa/kernels/matmul.h"
#include "mesa/ops/ops.h"

namespace mesa {
namespace {

/// A copy of its own memory.
Tensor contiguous(const Tensor& view) {
  const Tensor out = empty_like(view);
  kernels::copy(view, out);
  return out;
}

}  // namespace

Var patch_embed(const Var& images, const Var& w, const Var& b, DType compute, DType out) {
  const Op op("patch_embed", {images, w, b});
  check(images.value().rank() == 4 && w.value().rank() == 4 && images.dim(1) == w.dim(1) && w.dim(2) == w.dim(3), "patch_embed: images ",
        images.shape(), " do not fit the weight ", w.shape());
  const int64_t p = w.dim(2), C = w.dim(0), P = w.value().numel() / C;
  check(images.dim(2) % p == 0 && images.dim(3) % p == 0, "images of ", images.dim(2), " x ", images.dim(3),
        " do not divide into patches of ", p);
  const int64_t B = images.dim(0), N = images.dim(2) / p * (images.dim(3) / p);
  const auto patches_of = [=](const Tensor& x) {
    const Tensor patches = Tensor::empty({B, N, P}, compute, x.device());
    kernels::extract_patches(x, p, patches);
    return patches.reshape({B * N, P});
  };
  const Tensor weight = (w.param() ? w.param()->as(compute) : w.value()).reshape({C, P});
  const Tensor y = Tensor::empty({B, N, C}, out, images.value().device());
  kernels::matmul(patches_of(images.value()), weight.transpose(0, 1), y.reshape({B * N, C}), b.value());
  const Saved sx = op.wants(w) ? op.save("x", images) : Saved();
  return op.record(y,
                   [=, to_x = op.wants(images), shape_x = images.shape(), type_x = images.dtype(), dw = op.gradient(w),
                    db = op.gradient(b)](const Tensor& dy_) -> Grads {
                     const Tensor dy = cast(dy_.reshape({B * N, C}), compute);
                     const auto [to_w, to_b] = weight_and_bias_grads(dw, db, dy, [&] { return patches_of(sx.get()); });
                     Grads grads{Tensor(), to_w, to_b};
                     if (to_x) {
                       const Tensor dpatches = Tensor::empty({B, N, P}, compute, dy.device());
                       kernels::matmul(dy, weight, dpatches.reshape({B * N, P}));
                       grads[0] = Tensor::empty(shape_x, type_x, dy.device());
                       kernels::scatter_patches(dpatches, p, grads[0]);
                     }
                     return grads;
                   });
}

namespace {

/// [B, height width, C] as [B, height/p, width/p, p, p, C], a view: patches with the channels innermost.
Tensor patches_view(const Tensor& x, int64_t height, int64_t width, int64_t p) {
  const int64_t C = x.dim(2);
  return x.as_strided({x.dim(0), height / p, width / p, p, p, C}, {height * width * C, p * width * C, p * C, width * C, C, 1}, x.offset());
}
/// [O, C, p, p] as [O, p, p, C], a view.
Tensor channels_last(const Tensor& w) { return w.transpose(1, 2).transpose(2, 3); }

}  // namespace

Var patch_conv(const Var& x, int64_t height, int64_t width, const Var& w, const Var& b, DType compute, DType out) {
  const Op op("patch_conv", {x, w, b});
  check(x.value().rank() == 3 && x.value().is_contiguous() && w.value().rank() == 4 && x.dim(1) == height * width && x.dim(2) == w.dim(1) &&
            w.dim(2) == w.dim(3) && b.shape() == Shape({w.dim(0)}),
        "patch_conv: tokens ", x.shape(), " of a grid ", height, " x ", width, " do not fit the weight ", w.shape());
  const int64_t p = w.dim(2), O = w.dim(0), C = w.dim(1), P = p * p * C;
  check(height % p == 0 && width % p == 0, "a grid of ", height, " x ", width, " does not divide into patches of ", p);
  const int64_t B = x.dim(0), N = height / p * (width / p);
  const auto patches_of = [=](const Tensor& t) { return contiguous(patches_view(t, height, width, p)).reshape({B * N, P}); };
  const auto matrix_of = [=](const Tensor& weight) {
    const Tensor m = Tensor::empty({O, p, p, C}, compute, weight.device());
    kernels::copy(channels_last(weight), m);
    return m.reshape({O, P});
  };
  const Tensor weight = w.value(), input = cast(x.value(), compute), y = Tensor::empty({B, N, O}, out, input.device());
  kernels::matmul(patches_of(input), matrix_of(weight).transpose(0, 1), y.reshape({B * N, O}), b.value());
  // With x itself comes its recipe.
  const Saved sx = !op.wants(w) ? Saved() : x.dtype() == compute ? op.save("x", x) : op.save("x", input);
  return op.record(y,
                   [=, to_x = op.wants(x), shape_x = x.shape(), type_x = x.dtype(), dw = op.gradient(w),
                    db = op.gradient(b)](const Tensor& dy_) -> Grads {
                     const Tensor dy = cast(dy_.reshape({B * N, O}), compute);
                     Grads grads(3);
                     grads[1] = dw.into([&](const Tensor& to, bool add) {
                       const Tensor dm = Tensor::empty({O, P}, to.dtype(), to.device()), term = add ? empty_like(to) : to;
                       kernels::matmul_weight_grad(dy, patches_of(sx.get()), dm, false, Tensor(), false);
                       kernels::copy(dm.reshape({O, p, p, C}), channels_last(term));
                       if (add) kernels::add(to, term, to);
                     });
                     grads[2] = db.into([&](const Tensor& to, bool add) { kernels::sum_rows(dy, to, add); });
                     if (to_x) {
                       const Tensor dpatches = Tensor::empty({B * N, P}, compute, dy.device());
                       kernels::matmul(dy, matrix_of(weight), dpatches);
                       grads[0] = Tensor::empty(shape_x, type_x, dy.device());
                       const Tensor into = patches_view(grads[0], height, width, p);
                       kernels::copy(dpatches.reshape(into.shape()), into);
                     }
                     return grads;
                   });
}

Var prepend_tokens(const std::vector<Var>& tokens, const Var& x) {
  std::vector<Var> inputs = tokens;
  inputs.push_back(x);
  const Op op("prepend_tokens", inputs);
  check(x.value().rank() == 3, "prepend_tokens needs [B, N, C], not ", x.shape());
  const int64_t C = x.dim(-1), N = x.dim(1);
  int64_t T = 0;
  for (const Var& token : tokens) {
    check(token.value().rank() == 3 && token.dim(0) == 1 && token.dim(2) == C, "tokens ", token.shape(), " do not fit ", x.shape());
    T += token.dim(1);
  }
  check(T > 0, "prepend_tokens got no token");
  const Tensor front = Tensor::empty({T, C}, tokens[0].dtype(), x.value().device());
  struct Part {
    int64_t from, count;
    Target gradient;
  };
  std::vector<Part> parts;
  for (const Var& token : tokens) {
    const Part part{parts.empty() ? 0 : parts.back().from + parts.back().count, token.dim(1), op.gradient(token)};
    kernels::copy(token.value().reshape({part.count, C}), front.narrow(0, part.from, part.count));
    parts.push_back(part);
  }
  const Tensor y = Tensor::empty(x.shape().with(1, T + N), x.dtype(), x.value().device());
  kernels::prepend_tokens(front, x.value(), y);
  return op.record(y, [=, to_x = op.wants(x)](const Tensor& dy) -> Grads {
    Grads grads;
    for (const Part& part : parts)
      grads.push_back(part.gradient.into([&](const Tensor& to, bool add) {
        const Tensor all = contiguous(dy.narrow(1, part.from, part.count));  // summed over B, as rows of count C elements
        kernels::sum_rows(all.reshape({dy.dim(0), part.count * C}), to.reshape({part.count * C}), add);
      }));
    grads.push_back(to_x ? contiguous(dy.narrow(1, T, N)) : Tensor());
    return grads;
  });
}

namespace {

/// Part of x, [B, ..., C], as a tensor of its own: a view would pin all tokens. `part` picks it from x and from its gradient.
template <class Part>
Var copied(const char* name, const Var& x, const Part& part) {
  const Op op(name, {x});
  const Var result = op.record(contiguous(part(x.value())), [part, shape = x.shape()](const Tensor& dy) -> Grads {
    const Tensor dx = Tensor::empty(shape, dy.dtype(), dy.device());
    kernels::fill(dx, 0);
    kernels::copy(dy, part(dx));
    return {dx};
  });
  if (x.recipe() == nullptr) return result;
  return result.with_recipe(x.recipe()->then([part](const Tensor& whole) { return contiguous(part(whole)); }));
}

}  // namespace

Var first_tokens(const Var& x, int64_t n) {
  check(x.value().rank() == 3 && n >= 1 && n <= x.dim(1), "the first ", n, " tokens of ", x.shape());
  return copied("first_tokens", x, [n](const Tensor& t) { return t.narrow(1, 0, n); });
}

Var select_token(const Var& x, int64_t index) {
  check(x.value().rank() == 3 && index >= 0 && index < x.dim(1), "the token at ", index, " of ", x.shape());
  return copied("select_token", x, [index](const Tensor& t) { return t.select(1, index); });
}

Var mean_pool(const Var& x, int64_t from) {
  const Op op("mean_pool", {x});
  check(x.value().rank() == 3 && from >= 0 && from < x.dim(1), "mean_pool from token ", from, " of ", x.shape());
  const auto mean = [from](const Tensor& t) {
    const Tensor y = Tensor::empty({t.dim(0), t.dim(2)}, t.dtype(), t.device());
    kernels::mean_tokens(t, from, y);
    return y;
  };
  const Var result = op.record(mean(x.value()), [from, shape = x.shape()](const Tensor& dy) -> Grads {
    const Tensor dx = Tensor::empty(shape, dy.dtype(), dy.device());
    kernels::mean_tokens_grad(dy, from, dx);
    return {dx};
  });
  if (x.recipe() == nullptr) return result;
  return result.with_recipe(x.recipe()->then(mean));
}

}  // namespace mesa
