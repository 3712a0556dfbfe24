#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/image.h"
#include "mesa/kernels/matmul.h"
#include "mesa/ops/ops.h"
#include "weight_grad.h"

namespace mesa {

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
                     Tensor dy = dy_.reshape({B * N, C});
                     if (dy.dtype() != compute) {
                       const Tensor narrow = empty_like(dy, compute);
                       kernels::copy(dy, narrow);
                       dy = narrow;
                     }
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

Var prepend_token(const Var& token, const Var& x) {
  const Op op("prepend_token", {token, x});
  const int64_t C = x.dim(-1), N = x.dim(1);
  check(x.value().rank() == 3 && token.value().numel() == C, "a token ", token.shape(), " does not fit ", x.shape());
  const Tensor y = Tensor::empty(x.shape().with(1, N + 1), x.dtype(), x.value().device());
  kernels::prepend_token(token.value().reshape({C}), x.value(), y);
  return op.record(y, [=, to_x = op.wants(x), dtoken = op.gradient(token)](const Tensor& dy) -> Grads {
    const auto contiguous = [](const Tensor& view) {
      const Tensor out = empty_like(view);
      kernels::copy(view, out);
      return out;
    };
    return {dtoken.into([&](const Tensor& to, bool add) { kernels::sum_rows(contiguous(dy.select(1, 0)), to.reshape({C}), add); }),
            to_x ? contiguous(dy.narrow(1, 1, N)) : Tensor()};
  });
}

Var select_token(const Var& x, int64_t index) {
  const Op op("select_token", {x});
  check(x.value().rank() == 3, "select_token needs [B, N, C], not ", x.shape());
  const Tensor y = Tensor::empty({x.dim(0), x.dim(2)}, x.dtype(), x.value().device());
  kernels::copy(x.value().select(1, index), y);  // a copy: a view would pin all tokens
  return op.record(y, [index, shape = x.shape()](const Tensor& dy) -> Grads {
    const Tensor dx = Tensor::empty(shape, dy.dtype(), dy.device());
    kernels::fill(dx, 0);
    kernels::copy(dy, dx.select(1, index));
    return {dx};
  });
}

Var mean_pool(const Var& x, int64_t from) {
  const Op op("mean_pool", {x});
  check(x.value().rank() == 3 && from >= 0 && from < x.dim(1), "mean_pool from token ", from, " of ", x.shape());
  const Tensor y = Tensor::empty({x.dim(0), x.dim(2)}, x.dtype(), x.value().device());
  kernels::mean_tokens(x.value(), from, y);
  return op.record(y, [from, shape = x.shape()](const Tensor& dy) -> Grads {
    const Tensor dx = Tensor::empty(shape, dy.dtype(), dy.device());
    kernels::mean_tokens_grad(dy, from, dx);
    return {dx};
  });
}

}  // namespace mesa
