#include "mesa/kernels/conv.h"
#include "mesa/ops/ops.h"

namespace mesa {

Var max_pool2d(const Var& x, const kernels::ConvGeometry& geometry) {
  const Op op("max_pool2d", {x});
  geometry.validate();
  check(x.value().rank() == 3 && x.value().is_contiguous() && x.dim(1) == geometry.height * geometry.width, "max_pool2d of a grid ",
        geometry.height, " x ", geometry.width, " got ", x.shape());
  const Shape shape = x.shape().with(1, geometry.out_height() * geometry.out_width());
  const Tensor y = Tensor::empty(shape, x.dtype(), x.value().device()), index = empty_like(y, DType::u8);
  kernels::max_pool(x.value(), geometry, y, index);
  return op.record(y, [index = op.keep("index", index), geometry, shape_x = x.shape()](const Tensor& dy) -> Grads {
    const Tensor dx = Tensor::empty(shape_x, dy.dtype(), dy.device());
    kernels::max_pool_grad(dy, index, geometry, dx);
    return {dx};
  });
}

}  // namespace mesa
