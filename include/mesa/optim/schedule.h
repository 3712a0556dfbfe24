// Learning-rate schedules.
#pragma once
#include <cstdint>

namespace mesa {

/// Linear warm-up from warmup_lr to lr, then:
/// - cosine: half a wave from lr to min_lr (Loshchilov and Hutter, ICLR 2017);
/// - linear: a line from lr to min_lr;
/// - step: lr decay_rate^n after n times decay_steps updates, counted from the beginning of the run, warm-up included (as in timm);
/// - constant: lr.
/// The learning rate changes with each update. timm's default changes it once an epoch, and its cosine begins with the warm-up, which only
/// hides its first part (Mesa's is timm's with warmup_prefix, over the epochs that are left); Swin's linear schedule is this one.
/// A function of the step alone, so that resuming needs no state.
struct Schedule {
  enum class Kind { cosine, linear, step, constant } kind = Kind::cosine;
  double lr = 1e-3, warmup_lr = 1e-6, min_lr = 1e-5;
  int64_t warmup_steps = 0, total_steps = 1;
  double decay_rate = 0.1;
  int64_t decay_steps = 1;  ///< at least 1
  /// Learning rate of update `step` (0-based).
  double at(int64_t step) const;
};

}  // namespace mesa
