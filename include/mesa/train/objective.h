// What training minimizes: cross-entropy or independent yes-or-no losses against labels that may be mixed, and what a teacher says.
#pragma once
#include "mesa/train/teacher.h"

namespace mesa {

/// A batch with what its logits are compared with.
struct Targets {
  Tensor labels;   ///< i64 [B]; undefined where `soft` serves
  Tensor soft;     ///< [B, K]: mixed and smoothed labels
  Tensor teacher;  ///< i64 [B] the teacher's choices, or its logits [B, K]; undefined without one
};

class Objective {
 public:
  /// Throws UsageError where train.loss and distill.* do not go together, or the teacher does not fit.
  Objective(const RunConfig& config, const ImageConfig& model, Device device);
  /// Before a tape records.
  Targets targets(const Prepared& batch) const;
  /// The scalar that is minimized. Distillation (Touvron et al. 2021, section 4, as in DeiT's code): (1 - alpha) times the loss of the
  /// class head + alpha times that of the distillation head (of the same head if there is one only) against the teacher: cross-entropy with
  /// its choices (hard), or tau^2 / K times the mean divergence KL(teacher || student) of softmax(logits / tau) (soft).
  Var operator()(const Net& net, const Tensor& images, const Targets& targets) const;

 private:
  Var supervised(const Var& logits, const Targets& targets) const;
  Var imitating(const Var& logits, const Tensor& teacher) const;

  bool binary_, dense_, hard_ = false;
  double smoothing_, threshold_, alpha_ = 0, tau_ = 1;
  int64_t classes_;
  std::optional<Teacher> teacher_;
};

}  // namespace mesa
