#include "mesa/optim/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace mesa {

double Schedule::at(int64_t step) const {
  if (step < warmup_steps) return warmup_lr + (lr - warmup_lr) * static_cast<double>(step) / static_cast<double>(warmup_steps);
  if (kind == Kind::step) return lr * std::pow(decay_rate, static_cast<double>(step / decay_steps));
  if (kind == Kind::constant || total_steps <= warmup_steps) return lr;
  const double done = std::min(1.0, static_cast<double>(step - warmup_steps) / static_cast<double>(total_steps - warmup_steps));
  const double left = kind == Kind::linear ? 1 - done : 0.5 * (1 + std::cos(std::numbers::pi * done));
  return min_lr + (lr - min_lr) * left;
}

}  // namespace mesa
