// How two samples of a batch become one: mixup (Zhang et al., ICLR 2018) and CutMix (Yun et al., ICCV 2019) in one form.
#pragma once
#include <cstdint>

#include "mesa/base/dtype.h"

namespace mesa {

/// Of sample b and its partner. Its own pixels weigh `inside` within the box [y0, y1) x [x0, x1) and 1 elsewhere, the partner's the rest;
/// its own label weighs `share`. Mixup's box is the whole picture, CutMix weighs 0 within. A batch's mixing is a tensor [B, 6] f32 of these.
struct Mixing {
  float inside = 1, y0 = 0, x0 = 0, y1 = 0, x1 = 0, share = 1;

  /// Of the own pixel in row y and column x.
  MESA_HD float weight(int64_t y, int64_t x) const {
    const float row = static_cast<float>(y), column = static_cast<float>(x);
    return row >= y0 && row < y1 && column >= x0 && column < x1 ? inside : 1.0f;
  }
  static constexpr int64_t kNumbers = 6;
  /// The neighbour: wherever a batch is cut into even parts, for ranks or accumulation, each part has its samples' partners.
  MESA_HD static int64_t partner(int64_t b) { return b ^ 1; }
};
static_assert(sizeof(Mixing) == Mixing::kNumbers * sizeof(float));

}  // namespace mesa
