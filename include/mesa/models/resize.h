// Weights of another picture size or window: rows of a grid, resized.
#pragma once
#include "mesa/tensor/tensor.h"

namespace mesa {

/// rows [height width, C] f32 in host memory -> [to_height to_width, C]: bicubic (Keys, 1981, with a = -0.75), places at pixel centres,
/// edges repeated; what torch.nn.functional.interpolate(mode="bicubic", align_corners=False) gives, with which DeiT and Swin resize theirs.
Tensor resize_bicubic(const Tensor& rows, int64_t height, int64_t width, int64_t to_height, int64_t to_width);

}  // namespace mesa
