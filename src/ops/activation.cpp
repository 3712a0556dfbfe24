#include "mesa/kernels/elementwise.h"
#include "mesa/ops/ops.h"

namespace mesa {
namespace {

/// For sums of dx's columns, where the kernel that makes dx makes them in the same visit: eight columns a thread, of one group.
Tensor room_for_sums(const Tensor& dx, const std::optional<kernels::Coded>& x) {
  if (!is_gpu(dx.device()) || dx.dtype() == DType::f64 || dx.dim(-1) % 8 != 0 || (x && x->layout.inner % 8 != 0)) return {};
  return Tensor::empty({kernels::sum_parts(dx.rows(), dx.dim(-1)), dx.dim(-1)}, DType::f32, dx.device());
}

}  // namespace

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
  const auto formula = [saved](const Tensor& dy, const Extras& extras) -> Grads {
    const Tensor dx = may_overwrite(dy) ? dy : empty_like(dy);  // memory is scarcest here
    Tensor again, sums;
    if (extras.y) again = *extras.y = empty_like(dy);
    const std::optional<kernels::Coded> coded = saved.coded_on_gpu();
    if (extras.dx_sums) sums = *extras.dx_sums = room_for_sums(dx, coded);
    if (coded && sums.defined())
      kernels::gelu_grad_coded_sums(dy, *coded, dx, again, sums);
    else if (coded)
      kernels::gelu_grad_coded(dy, *coded, dx, again);
    else if (sums.defined())
      kernels::gelu_grad_sums(dy, saved.get(), dx, again, sums);
    else
      kernels::gelu_grad(dy, saved.get(), dx, again);
    return {dx};
  };
  return op.record(y, formula, {.rebuild = [saved](const Tensor& again) {
                     if (const auto coded = saved.coded_on_gpu())
                       kernels::gelu_coded(*coded, again);
                     else
                       kernels::gelu(saved.get(), again);
                   }});
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
  return result.with_recipe(x.recipe()->then(masked));
}

}  // namespace mesa
