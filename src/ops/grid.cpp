// Tokens as a grid: the same values in another arrangement.
#include "mesa/kernels/elementwise.h"
#include "mesa/ops/ops.h"

namespace mesa {
namespace {

void check_grid(const Var& x, int64_t height, int64_t width, const char* name) {
  check(x.value().rank() == 3 && x.value().is_contiguous() && height > 0 && width > 0 && x.dim(1) == height * width, name, " of a grid ",
        height, " x ", width, " needs [B, ", height * width, ", C], not ", x.shape());
}

/// The part of a grid that begins at its first token.
Tensor corner(const Tensor& x, int64_t height, int64_t width, int64_t part_height, int64_t part_width) {
  return x.reshape({x.dim(0), height, width, x.dim(2)}).narrow(1, 0, part_height).narrow(2, 0, part_width);
}

Tensor padded(const Tensor& x, int64_t h, int64_t w, int64_t H, int64_t W) {
  const Tensor y = Tensor::empty({x.dim(0), H * W, x.dim(2)}, x.dtype(), x.device());
  kernels::fill(y, 0);
  kernels::copy(x.reshape({x.dim(0), h, w, x.dim(2)}), corner(y, H, W, h, w));
  return y;
}
Tensor cropped(const Tensor& x, int64_t H, int64_t W, int64_t h, int64_t w) {
  const Tensor y = Tensor::empty({x.dim(0), h * w, x.dim(2)}, x.dtype(), x.device());
  kernels::copy(corner(x, H, W, h, w), y.reshape({x.dim(0), h, w, x.dim(2)}));
  return y;
}

/// [B, H W, C] as [B, H/2, W/2, 2 (column), 2 (row), C], a view: the order of merged patches.
Tensor squares(const Tensor& x, int64_t height, int64_t width) {
  const int64_t C = x.dim(2);
  return x.as_strided({x.dim(0), height / 2, width / 2, 2, 2, C}, {height * width * C, 2 * width * C, 2 * C, C, width * C, 1}, x.offset());
}

}  // namespace

Var merge_patches(const Var& x, int64_t height, int64_t width) {
  const Op op("merge_patches", {x});
  check_grid(x, height, width, "merge_patches");
  check(height % 2 == 0 && width % 2 == 0, "merge_patches needs an even grid, not ", height, " x ", width);
  const Tensor y = Tensor::empty({x.dim(0), height / 2 * (width / 2), 4 * x.dim(2)}, x.dtype(), x.value().device());
  const Tensor from = squares(x.value(), height, width);
  kernels::copy(from, y.reshape(from.shape()));
  return op.record(y, [=, shape = x.shape()](const Tensor& dy) -> Grads {
    const Tensor dx = Tensor::empty(shape, dy.dtype(), dy.device()), into = squares(dx, height, width);
    kernels::copy(dy.reshape(into.shape()), into);
    return {dx};
  });
}

Var pad_grid(const Var& x, int64_t height, int64_t width, int64_t to_height, int64_t to_width) {
  const Op op("pad_grid", {x});
  check_grid(x, height, width, "pad_grid");
  check(to_height >= height && to_width >= width, "a grid of ", height, " x ", width, " cannot be padded to ", to_height, " x ", to_width);
  const auto pad = [=](const Tensor& t) { return padded(t, height, width, to_height, to_width); };
  const Var y = op.record(pad(x.value()), [=](const Tensor& dy) -> Grads { return {cropped(dy, to_height, to_width, height, width)}; });
  if (x.recipe() == nullptr) return y;
  return y.with_recipe(x.recipe()->then(pad));
}

Var crop_grid(const Var& x, int64_t height, int64_t width, int64_t to_height, int64_t to_width) {
  const Op op("crop_grid", {x});
  check_grid(x, height, width, "crop_grid");
  check(to_height > 0 && to_height <= height && to_width > 0 && to_width <= width, "a grid of ", height, " x ", width,
        " cannot be cropped to ", to_height, " x ", to_width);
  return op.record(cropped(x.value(), height, width, to_height, to_width),
                   [=](const Tensor& dy) -> Grads { return {padded(dy, to_height, to_width, height, width)}; });
}

}  // namespace mesa
