#include "mesa/kernels/loss.h"
#include "mesa/ops/ops.h"

namespace mesa {
namespace {

Tensor mean(const Tensor& per_sample) {
  const Tensor loss = Tensor::empty({1}, per_sample.dtype(), per_sample.device());
  kernels::mean_all(per_sample, loss);
  return loss;
}

/// The mean over a batch of a loss against targets of the logits' form. The kernels live as long as the program.
template <class Loss, class Grad>
Var against_targets(const char* name, const Var& logits, const Var& targets, const Loss& loss, const Grad& grad) {
  const Op op(name, {logits});
  check(logits.value().rank() == 2 && logits.shape() == targets.shape(), name, ": logits ", logits.shape(), " and soft targets ",
        targets.shape(), " differ");
  const Tensor x = op.keep("logits", logits.value()), t = op.keep("targets", targets.value());
  const Tensor losses = Tensor::empty({logits.dim(0)}, x.dtype(), x.device());
  loss(x, t, losses);
  return op.record(mean(losses), [x, t, &grad](const Tensor& dloss) -> Grads {
    const Tensor dx = empty_like(x);
    grad(dloss, x, t, dx);
    return {dx};
  });
}

}  // namespace

void check_labels(const Tensor& labels, int64_t classes) {
  for (int64_t i = 0; i < labels.numel(); ++i) {
    const int64_t label = labels.data<int64_t>()[i];
    check(label >= 0 && label < classes, "sample ", i, " of the batch has label ", label, " but there are ", classes, " classes");
  }
}

Var cross_entropy(const Var& logits, const Tensor& labels, double smoothing) {
  const Op op("cross_entropy", {logits});
  check(logits.value().rank() == 2 && labels.rank() == 1 && labels.dim(0) == logits.dim(0) && labels.dtype() == DType::i64,
        "cross_entropy: logits ", logits.shape(), " need as many i64 labels, not ", labels.shape(), " of ", to_string(labels.dtype()));
  check(smoothing >= 0 && smoothing < 1, "label smoothing is ", smoothing, "; it must lie in [0, 1)");
  if (labels.device().kind == DeviceKind::cpu) check_labels(labels, logits.dim(1));
  const Tensor x = op.keep("logits", logits.value());
  const Tensor losses = Tensor::empty({logits.dim(0)}, x.dtype(), x.device());
  kernels::cross_entropy(x, labels, smoothing, losses);
  return op.record(mean(losses), [=](const Tensor& dloss) -> Grads {
    const Tensor dx = empty_like(x);
    kernels::cross_entropy_grad(dloss, x, labels, smoothing, dx);
    return {dx};
  });
}

Var cross_entropy(const Var& logits, const Var& targets) {
  return against_targets("cross_entropy", logits, targets, kernels::cross_entropy_soft, kernels::cross_entropy_soft_grad);
}

Var binary_cross_entropy(const Var& logits, const Var& targets) {
  return against_targets("binary_cross_entropy", logits, targets, kernels::binary_cross_entropy, kernels::binary_cross_entropy_grad);
}

}  // namespace mesa
