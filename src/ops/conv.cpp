#include "mesa/kernels/conv.h"

#include "gradients.h"
#include "mesa/ops/ops.h"

namespace mesa {
namespace {

/// Images [B, ch, H, W] as the grid [B, H, W, ch], a view.
Tensor grid_view(const Tensor& images) { return images.transpose(1, 2).transpose(2, 3); }

/// What is convolved: tokens, or the pixels of images, in `dtype`.
Tensor tokens_of(const Tensor& x, DType dtype) {
  if (x.rank() == 3) return cast(x, dtype);
  const Tensor view = grid_view(x), tokens = Tensor::empty({x.dim(0), x.dim(2) * x.dim(3), x.dim(1)}, dtype, x.device());
  kernels::copy(view, tokens.reshape(view.shape()));
  return tokens;
}

/// The gradient of x from that of its tokens.
Tensor untoken(const Tensor& dtokens, const Shape& shape, DType dtype) {
  if (shape.rank() == 3) return cast(dtokens, dtype);
  const Tensor dx = Tensor::empty(shape, dtype, dtokens.device()), view = grid_view(dx);
  kernels::copy(dtokens.reshape(view.shape()), view);
  return dx;
}

}  // namespace

Var conv2d(const Var& x, const Var& w, const Var& b, const kernels::ConvGeometry& geometry, DType compute) {
  const Op op("conv2d", b.defined() ? std::vector<Var>{x, w, b} : std::vector<Var>{x, w});
  const int rank = x.value().rank();
  check((rank == 3 && x.value().is_contiguous() && x.dim(1) == geometry.height * geometry.width) ||
            (rank == 4 && x.dim(2) == geometry.height && x.dim(3) == geometry.width),
        "conv2d: ", x.shape(), " is neither a grid of ", geometry.height, " x ", geometry.width, " nor images of that size");
  check(w.value().rank() == 4, "conv2d: a weight of shape ", w.shape());
  geometry.validate();
  const int64_t B = x.dim(0), O = w.dim(0), places = geometry.out_height() * geometry.out_width();
  const Tensor input = tokens_of(x.value(), compute), weight = w.value(), y = Tensor::empty({B, places, O}, compute, input.device());
  kernels::conv2d(input, weight, b.value(), y, geometry);
  // With x itself comes its recipe; images are there anyway.
  const Saved sx = !op.wants(w) ? Saved() : rank == 4 || x.dtype() == compute ? op.save("x", x) : op.save("x", input);
  return op.record(y,
                   [=, to_x = op.wants(x), shape_x = x.shape(), shape_tokens = input.shape(), type_x = x.dtype(), dw = op.gradient(w),
                    has_bias = b.defined(), db = b.defined() ? op.gradient(b) : Target()](const Tensor& dy_) -> Grads {
                     const Tensor dy = cast(dy_, compute);
                     Grads grads(has_bias ? 3 : 2);
                     grads[1] = dw.into([&](const Tensor& to, bool add) {
                       kernels::conv2d_weight_grad(dy, tokens_of(sx.get(), compute), to, add, geometry);
                     });
                     if (has_bias) grads[2] = db.into([&](const Tensor& to, bool add) { kernels::sum_rows(dy, to, add); });
                     if (to_x) {
                       const Tensor dtokens = Tensor::empty(shape_tokens, compute, dy.device());
                       kernels::conv2d_data_grad(dy, weight, dtokens, geometry);
                       grads[0] = untoken(dtokens, shape_x, type_x);
                     }
                     return grads;
                   });
}

}  // namespace mesa
