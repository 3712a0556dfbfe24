// What changes the weights: the seam between a run and its optimizer, and the clipping of gradients.
#pragma once
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "mesa/autograd/var.h"
#include "mesa/kernels/optimizer.h"

namespace mesa {

/// Updates the trainable parameters of a store, which must outlive it. What differs among parameters stands in them: Param::decay says
/// whether weight decay falls on one, Param::lr_scale its share of the learning rate. A parameter without a gradient in a step stays as it
/// is.
class Optimizer {
 public:
  virtual ~Optimizer() = default;
  /// As the config names it.
  virtual const char* name() const = 0;

  /// The norm of all gradients together, each multiplied by `scale`; NaN or infinite if any gradient is.
  double gradient_norm(double scale = 1.0) const;
  /// One update at learning rate `lr` with gradients multiplied by `gradient_scale` (clipping, averaging).
  void step(double lr, double gradient_scale = 1.0);
  int64_t steps() const { return steps_; }

  /// Moments by "<parameter>/<moment>", such as "head.bias/exp_avg", and the step count: for the checkpoint.
  std::map<std::string, Tensor> state() const;
  /// Throws Error naming the first tensor that is missing or has another shape.
  void load_state(const std::map<std::string, Tensor>& state, int64_t steps);

 protected:
  /// `moments`: PyTorch's names of what is remembered for each element, at most two. They begin at zero.
  Optimizer(std::deque<Param>& params, double weight_decay, std::vector<std::string> moments);

 private:
  struct Slot {
    Param* param;
    std::vector<Tensor> moments;
  };
  /// `step` is 1 for the first update.
  virtual void update(const std::vector<kernels::UpdateSlot>& slots, double lr, double gradient_scale, int64_t step) = 0;

  double weight_decay_;
  std::vector<std::string> moments_;
  std::vector<Slot> slots_;
  int64_t steps_ = 0;
};

/// Factor that brings a gradient of this norm down to `limit` (0: no limit), as torch.nn.utils.clip_grad_norm_ does.
double clipping_scale(double limit, double norm);

}  // namespace mesa
