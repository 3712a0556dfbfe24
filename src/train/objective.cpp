#include "mesa/train/objective.h"

#include "mesa/base/scope.h"
#include "mesa/kernels/loss.h"

namespace mesa {

Objective::Objective(const RunConfig& config, const ImageConfig& model, Device device)
    : binary_(config.train.loss == "bce"),
      dense_(binary_ || config.data.mixup > 0 || config.data.cutmix > 0),
      smoothing_(config.train.label_smoothing),
      threshold_(config.train.bce_threshold.value_or(-1)),
      classes_(model.classes) {
  if (config.train.bce_threshold && !binary_) config.refuse("train.bce_threshold", "has no effect while train.loss is ", config.train.loss);
  const DistillConfig& d = config.distill;
  if (d.kind == "none") {
    const DistillConfig unused;
    const char* set = !d.teacher.empty()        ? "distill.teacher"
                      : d.model != unused.model ? "distill.model"
                      : d.alpha != unused.alpha ? "distill.alpha"
                      : d.tau != unused.tau     ? "distill.tau"
                                                : nullptr;
    if (set != nullptr) config.refuse(set, "has no effect while distill.kind is none; soft or hard would use it");
    return;
  }
  if (config.distill.kind == "hard" && d.tau != 1) config.refuse("distill.tau", "has no effect on hard distillation");
  if (d.teacher.empty()) config.refuse("distill.teacher", "is empty; distillation (distill.kind: ", d.kind, ") needs a checkpoint");
  hard_ = d.kind == "hard";
  alpha_ = d.alpha, tau_ = d.tau;
  teacher_.emplace(config, model, device);
}

Targets Objective::targets(const Prepared& batch) const {
  Targets out;
  if (dense_) {
    out.soft = Tensor::empty({batch.labels.dim(0), classes_}, DType::f32, batch.labels.device());
    kernels::mixed_targets(batch.labels, batch.mixing, smoothing_, threshold_, out.soft);
  } else {
    out.labels = batch.labels;
  }
  if (!teacher_) return out;
  out.teacher = (*teacher_)(batch.images);
  if (!hard_) return out;
  const Tensor choices = Tensor::empty({batch.labels.dim(0)}, DType::i64, batch.labels.device());
  kernels::argmax(out.teacher, choices);
  out.teacher = choices;
  return out;
}

Var Objective::supervised(const Var& logits, const Targets& targets) const {
  if (binary_) return binary_cross_entropy(logits, Var(targets.soft));
  return dense_ ? cross_entropy(logits, Var(targets.soft)) : cross_entropy(logits, targets.labels, smoothing_);
}

Var Objective::imitating(const Var& logits, const Tensor& teacher) const {
  if (hard_) return cross_entropy(logits, teacher);
  const Var warm = scale(Var(teacher), 1 / tau_), p = softmax(warm);
  const Var divergence = cross_entropy(scale(logits, 1 / tau_), p) + scale(cross_entropy(warm, p), -1);
  return scale(divergence, tau_ * tau_ / static_cast<double>(classes_));
}

Var Objective::operator()(const Net& net, const Tensor& images, const Targets& targets) const {
  if (!teacher_) return supervised(net(images), targets);
  const std::vector<Var> heads = net.heads(images);
  const auto within = [](const char* name, const auto& loss) {  // sites of their own
    const Scope scope(name);
    return loss();
  };
  const Var by_labels = within("labels", [&] { return supervised(heads.front(), targets); });
  const Var by_teacher = within("teacher", [&] { return imitating(heads.back(), targets.teacher); });
  return scale(by_labels, 1 - alpha_) + scale(by_teacher, alpha_);
}

}  // namespace mesa
