// What changes the weights: the seam between a run and its optimizer, and the clipping of gradients.
#pragma once
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "mesa/autograd/var.h"
#include "mesa/kernels/optimizer.h"

namespace mesa {

/// Of an optimizer whose work and state several ranks share (ZeRO's first stage, Rajbhandari et al., SC 2020): what this one has.
struct OptimizerShard {
  std::vector<ArenaRange> ranges = {};  ///< of the gradients, which must lie in one arena; no range: all of them
  /// x <- its sum over the ranks that share.
  std::function<void(const Tensor& x)> add_up = {};
  /// f(parameter, values of its shape) for all, put together from what each rank has for its ranges; on those ranks that want to know.
  using Each = std::function<void(const Param& param, const Tensor& values)>;
  std::function<void(const std::vector<Tensor>& parts, const Each& f)> gather = {};
};

/// Updates the trainable parameters of a store, which must outlive it. What differs among parameters stands in them: Param::decay says
/// whether weight decay falls on one, Param::lr_scale its share of the learning rate. A parameter without a gradient in a step stays as it
/// is.
class Optimizer {
 public:
  virtual ~Optimizer() = default;
  /// As the config names it.
  virtual const char* name() const = 0;

  /// The norm of all gradients together, those of other shards too, each multiplied by `scale`; NaN or infinite if any gradient is.
  double gradient_norm(double scale = 1.0) const;
  /// One update at learning rate `lr` with gradients multiplied by `gradient_scale` (clipping, averaging).
  void step(double lr, double gradient_scale = 1.0);
  int64_t steps() const { return steps_; }

  /// True if other ranks have the rest of the state.
  bool sharded() const { return !shard_.ranges.empty(); }
  /// False if there is nothing to remember from step to step.
  bool remembers() const { return !moments_.empty(); }
  /// Moments by "<parameter>/<moment>", such as "head.bias/exp_avg": for the checkpoint. All shards must ask together.
  std::map<std::string, Tensor> state() const;
  /// Takes up the whole state or, of a shard, its part of it. Throws Error naming the first tensor that is missing or has another shape.
  void load_state(const std::map<std::string, Tensor>& state, int64_t steps);

 protected:
  /// `moments`: PyTorch's names of what is remembered for each element, at most two. They begin at zero.
  Optimizer(std::deque<Param>& params, double weight_decay, std::vector<std::string> moments, OptimizerShard shard);
  const OptimizerShard& shard() const { return shard_; }

 private:
  /// A trainable parameter, or the piece of one that a shard has, which may be empty.
  struct Slot {
    Param* param;
    ArenaRange piece;  ///< elements of the parameter
    std::vector<Tensor> moments;
  };
  /// The piece of a tensor of the parameter's shape.
  static Tensor piece_of(const Slot& slot, const Tensor& x) {
    return x.reshape({x.numel()}).narrow(0, slot.piece.begin, slot.piece.count());
  }
  void allocate_whole();
  void allocate_parts();
  /// `step` is 1 for the first update.
  virtual void update(const std::vector<kernels::UpdateSlot>& slots, double lr, double gradient_scale, int64_t step) = 0;

  double weight_decay_;
  std::vector<std::string> moments_;
  OptimizerShard shard_;
  std::vector<std::vector<Tensor>> parts_;  // by moment and range; empty where nothing is shared
  std::vector<Slot> slots_;
  int64_t steps_ = 0;
};

/// Factor that brings a gradient of this norm down to `limit` (0: no limit), as torch.nn.utils.clip_grad_norm_ does.
double clipping_scale(double limit, double norm);

}  // namespace mesa
