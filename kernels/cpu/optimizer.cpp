// AdamW: w <- w (1 - lr decay); m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2;
//        w <- w - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps).
// SGD: d = g + decay w; m <- mu m + d; w <- w - lr m, or lr (d + mu m).   Average: a <- a + (1 - decay) (w - a).
#include "parameters.h"

namespace mesa::kernels::MESA_ISA {

void adamw(const std::vector<UpdateSlot>& slots, AdamWStep step) {
  check_step(step.step, "adamw");
  check_slots(slots, 2, "adamw");
  update_all(slots, [&](auto tag) { return AdamWRule<decltype(tag)>(step); });
}

void sgd(const std::vector<UpdateSlot>& slots, SgdStep step) {
  check_slots(slots, step.momentum > 0 ? 1 : 0, "sgd");
  if (step.momentum > 0)
    update_all(slots, [&](auto tag) { return SgdRule<decltype(tag), true>(step); });
  else
    update_all(slots, [&](auto tag) { return SgdRule<decltype(tag), false>(step); });
}

void moving_average(const std::vector<AverageSlot>& slots, double decay) {
  update_all(as_updates(slots), [&](auto tag) { return AverageRule<decltype(tag)>(decay); });
}

}  // namespace mesa::kernels::MESA_ISA
