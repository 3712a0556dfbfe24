// The trained model that a student learns from (distillation): never trained itself, recorded by no tape.
#pragma once
#include "mesa/train/setup.h"

namespace mesa {

class Teacher {
 public:
  /// Reads distill.teacher; its model is what the file says or distill.model. Throws UsageError at the key whose value does not fit: the
  /// file, a teacher of other images, classes or normalization. On a meta device only the file's header is read.
  Teacher(const RunConfig& config, const ImageConfig& student, Device device);
  /// images as the student sees them -> logits [B, classes] f32. Call it while no tape records.
  Tensor operator()(const Tensor& images) const { return (*net_)(images).value(); }

 private:
  ParamStore params_;
  std::optional<Net> net_;
};

}  // namespace mesa
