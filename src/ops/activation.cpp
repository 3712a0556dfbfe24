#include "mesa/kernels/elementwise.h"
#include "mesa/ops/ops.h"

namespace mesa {

Var gelu(const Var& x) {
  const Op op("gelu", {x});
  const Tensor y = empty_like(x.value());
  const SavedAhead ahead = op.open("x", x.value());
  if (ahead.defined())
    kernels::gelu_codes(x.value(), y, ahead.codes);
  else
    kernels::gelu(x.value(), y);
  if (!op.recording()) return Var(y);
  const Saved saved = ahead.defined() ? ahead.saved : op.save("x", x);
  // Rebuilding y for the layer behind comes just before this op's own backward: it leaves the slope here, so that x is decoded once.
  const auto slope = std::make_shared<Tensor>();
  const Var result = op.record(y, [saved, slope](const Tensor& dy) -> Grads {
    const Tensor dx = empty_like(dy);
    if (slope->defined())
      kernels::mul(dy, *slope, dx);
    else if (const auto coded = saved.coded_on_gpu())
      kernels::gelu_grad_coded(dy, *coded, dx);
    else
      kernels::gelu_grad(dy, saved.get(), dx);
    *slope = Tensor();
    return {dx};
  });
  return result.with_recipe([saved, slope, shape = x.shape(), type = x.dtype(), device = x.value().device()] {
    const Tensor y = Tensor::empty(shape, type, device);
    *slope = empty_like(y);
    if (const auto coded = saved.coded_on_gpu())
      kernels::gelu_and_slope_coded(*coded, y, *slope);
    else
      kernels::gelu_and_slope(saved.get(), y, *slope);
    return y;
  });
}

Var relu(const Var& x) {
  const Op op("relu", {x});
  const Tensor y = empty_like(x.value());
  kernels::relu(x.value(), y);
  return op.record(y, [x = op.save("x", x)](const Tensor& dy) -> Grads {
    const Tensor dx = empty_like(dy);
    kernels::relu_grad(dy, x.get(), dx);
    return {dx};
  });
}

}  // namespace mesa
