#include "mesa/kernels/elementwise.h"
#include "mesa/ops/ops.h"

namespace mesa {

Var gelu(const Var& x) {
  const Op op("gelu", {x});
  const Tensor y = empty_like(x.value());
  kernels::gelu(x.value(), y);
  const Saved saved = op.save("x", x);
  const Var result = op.record(y, [saved](const Tensor& dy) -> Grads {
    const Tensor dx = empty_like(dy);
    kernels::gelu_grad(dy, saved.get(), dx);
    return {dx};
  });
  if (!op.recording()) return result;
  return result.with_recipe([saved] {
    const Tensor x = saved.get(), y = empty_like(x);
    kernels::gelu(x, y);
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
