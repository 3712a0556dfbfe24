#include "mesa/kernels/norm.h"
#include "mesa/ops/ops.h"

namespace mesa {

Var softmax(const Var& x) {
  const Op op("softmax", {x});
  const Tensor y = empty_like(x.value());
  kernels::softmax(x.value(), y);
  return op.record(y, [y = op.save("y", y)](const Tensor& dy) -> Grads {
    const Tensor dx = empty_like(dy);
    kernels::softmax_grad(dy, y.get(), dx);
    return {dx};
  });
}

}  // namespace mesa
