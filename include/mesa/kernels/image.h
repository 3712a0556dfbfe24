// From pixels to tokens and back to one vector an image.
#pragma once
#include <vector>

#include "mesa/kernels/kernel.h"
#include "mesa/tensor/mixing.h"

namespace mesa::kernels {

/// u8 [B, H, W, C] -> f32|bf16|f64 [B, C, H, W]: (x / 255 - mean[c]) / std[c]. A picture whose number in `mirrored` (u8 [B]; undefined:
/// none) is not 0 is read from right to left. Then, with `mixing` ([B, 6] f32, rows of Mixing; undefined: none), each pixel x is mixed with
/// that of the sample's partner.
MESA_KERNEL(normalize_images, const Tensor& pixels, const std::vector<float>& mean, const std::vector<float>& std, const Tensor& mirrored,
            const Tensor& mixing, const Tensor& y);
/// x [B, C, H, W] -> y [B, (H/p)(W/p), C p p], elements of a patch in (c, row, column) order as a p x p convolution reads them.
MESA_KERNEL(extract_patches, const Tensor& x, int64_t patch, const Tensor& y);
/// dx <- the inverse arrangement of dy.
MESA_KERNEL(scatter_patches, const Tensor& dy, int64_t patch, const Tensor& dx);
/// x [B, N, C], tokens [T, C] -> y [B, T + N, C] with the tokens first.
MESA_KERNEL(prepend_tokens, const Tensor& tokens, const Tensor& x, const Tensor& y);
/// x [B, N, C] -> y [B, C], the mean over tokens from..N-1.
MESA_KERNEL(mean_tokens, const Tensor& x, int64_t from, const Tensor& y);
/// dx [B, N, C] <- dy [B, C] / (N - from) for tokens from..N-1, 0 before.
MESA_KERNEL(mean_tokens_grad, const Tensor& dy, int64_t from, const Tensor& dx);

}  // namespace mesa::kernels
