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
    const bool over_slope = slope->defined() && slope->dtype() == dy.dtype();  // whose last use this is: memory is scarcest here
    const Tensor dx = over_slope ? *slope : empty_like(dy);
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
  if (!op.recording()) {
    kernels::relu(x.value(), y);
    return Var(y);
  }
  const Tensor mask = Tensor::empty({(y.numel() + 7) / 8}, DType::u8, y.device());
  kernels::relu_mask(x.value(), y, mask);
  op.keep("mask", mask);
  const auto masked = [mask](const Tensor& t) {
    const Tensor out = empty_like(t);
    kernels::apply_mask(t, mask, out);
    return out;
  };
  const Var result = op.record(y, [masked](const Tensor& dy) -> Grads { return {masked(dy)}; });
  if (x.recipe() == nullptr) return x.leaves_trace() ? result : result.without_trace();
  return result.with_recipe([masked, inner = x.recipe()] { return masked((*inner)()); });
}

}  // namespace mesa
