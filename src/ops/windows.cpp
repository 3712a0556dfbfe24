#include "mesa/kernels/windows.h"

#include "mesa/kernels/elementwise.h"
#include "mesa/ops/ops.h"

namespace mesa {

Var to_windows(const Var& x, const kernels::Windows& windows) {
  const Op op("to_windows", {x});
  check(x.value().rank() == 3, "to_windows needs [B, N, C], not ", x.shape());
  windows.validate(x.dim(1));
  const Tensor y = Tensor::empty({x.dim(0) * windows.count(), windows.length(), x.dim(2)}, x.dtype(), x.value().device());
  kernels::gather_windows(x.value(), windows, 0, y);
  return op.record(y, [windows, shape = x.shape()](const Tensor& dy) -> Grads {
    const Tensor dx = Tensor::empty(shape, dy.dtype(), dy.device());
    kernels::scatter_windows(dy, windows, 0, dx);
    return {dx};
  });
}

Var from_windows(const Var& x, const kernels::Windows& windows) {
  const Op op("from_windows", {x});
  windows.validate(windows.tokens());
  check(x.value().rank() == 3 && x.dim(1) == windows.length() && x.dim(0) % windows.count() == 0, "from_windows needs [B ", windows.count(),
        ", ", windows.length(), ", C], not ", x.shape());
  const Tensor y = Tensor::empty({x.dim(0) / windows.count(), windows.tokens(), x.dim(2)}, x.dtype(), x.value().device());
  kernels::scatter_windows(x.value(), windows, 0, y);
  return op.record(y, [windows, shape = x.shape()](const Tensor& dy) -> Grads {
    const Tensor dx = Tensor::empty(shape, dy.dtype(), dy.device());
    kernels::gather_windows(dy, windows, 0, dx);
    return {dx};
  });
}

Var window_bias(const Var& scores, const Var& table, const kernels::Windows& windows) {
  const Op op("window_bias", {scores, table});
  windows.validate(windows.tokens());
  const int64_t n = windows.length();
  check(scores.value().rank() == 4 && scores.dim(0) % windows.count() == 0 && scores.dim(2) == n && scores.dim(3) == n,
        "window_bias needs [B ", windows.count(), ", H, ", n, ", ", n, "], not ", scores.shape());
  const int64_t H = scores.dim(1);
  check(table.shape() == Shape({windows.distances(), H}), "window_bias: a table of ", table.shape(), " where [", windows.distances(), ", ",
        H, "] is needed");
  const Tensor bias = Tensor::empty({H, n, n}, table.dtype(), table.value().device()), y = empty_like(scores.value());
  kernels::expand_bias(table.value(), windows, bias);
  kernels::add_window_bias(scores.value(), 1, bias, windows, 0, y);
  // Softmax gives what was hidden the probability 0, and so its gradient.
  return op.record(y, [=, to_scores = op.wants(scores), d_table = op.gradient(table), type = table.dtype()](const Tensor& dy) -> Grads {
    return {to_scores ? dy : Tensor(), d_table.into([&](const Tensor& to, bool add) {
              const Tensor sum = Tensor::empty({H, n, n}, type, dy.device());
              kernels::sum_rows(dy.reshape({dy.dim(0), H * n * n}), sum.reshape({H * n * n}), false);
              kernels::expand_bias_grad(sum, windows, 1, to, add);
            })};
  });
}

}  // namespace mesa
