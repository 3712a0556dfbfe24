// Convolutions of grids of tokens through oneDNN and cuDNN, or as matrix products over unfolded windows; and pooling.
#pragma once
#include <compare>

#include "mesa/kernels/kernel.h"

namespace mesa::kernels {

/// A window that slides over a grid with `padding` on all four sides. Grids are tokens [B, height width, C], row by row.
struct ConvGeometry {
  int64_t height = 0, width = 0;  ///< of the grid that is read
  int64_t kernel_height = 1, kernel_width = 1;
  int64_t stride = 1, padding = 0, dilation = 1, groups = 1;

  int64_t out_height() const { return extent(height, kernel_height); }
  int64_t out_width() const { return extent(width, kernel_width); }
  int64_t taps() const { return kernel_height * kernel_width; }
  /// True if each result is a product with one token: no window.
  bool is_product() const { return taps() == 1 && stride == 1 && padding == 0 && groups == 1; }
  /// False if some tap of the kernel lies outside of the grid wherever the window stands: its gradient is 0.
  bool every_tap_reads() const { return reads(height, kernel_height, out_height()) && reads(width, kernel_width, out_width()); }
  auto operator<=>(const ConvGeometry&) const = default;
  /// Throws Error unless every extent is possible and the result has at least one token.
  void validate() const;

 private:
  int64_t extent(int64_t in, int64_t kernel) const {
    const int64_t room = in + 2 * padding - dilation * (kernel - 1) - 1;
    return room < 0 ? 0 : room / stride + 1;
  }
  bool reads(int64_t in, int64_t kernel, int64_t out) const {
    for (int64_t tap = 0; tap < kernel; ++tap) {
      bool found = false;
      for (int64_t place = 0; place < out && !found; ++place) {
        const int64_t at = place * stride - padding + tap * dilation;
        found = at >= 0 && at < in;
      }
      if (!found) return false;
    }
    return true;
  }
};

// x [B, HW, I], y [B, H'W', O], contiguous and of one dtype; w [O, I / groups, kh, kw] as PyTorch has it, contiguous, f32 (f64 where x is),
// cast to x's dtype for the products, which are summed in f32 (f64). With one number of threads the same arguments give the same bits.

/// y <- x * w (+ bias [O], of w's dtype).
void conv2d(const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& y, const ConvGeometry& geometry);
/// dx <- the gradient of x.
void conv2d_data_grad(const Tensor& dy, const Tensor& w, const Tensor& dx, const ConvGeometry& geometry);
/// dw <- (accumulate ? dw : 0) + the gradient of w.
void conv2d_weight_grad(const Tensor& dy, const Tensor& x, const Tensor& dw, bool accumulate, const ConvGeometry& geometry);

/// Passes of convolutions that ran slowly on a GPU in this process, with the reason: as products over unfolded windows where cuDNN did not
/// run them, or by an engine that cuDNN takes for slower than another. "gradient of w, [128, 64, 56, 56] by [64, 64, 3, 3], stride 1, in
/// bf16: no engine takes the graph".
std::vector<std::string> slow_convolutions();

namespace cuda {
/// Null in a build without cuDNN. Why cuDNN would not run the three passes of this convolution of B images, I to O channels, on a GPU with
/// these properties (see cudnn_attention_support), or ""; in one piece. A convolution that it does not take runs as products over unfolded
/// windows.
[[gnu::weak]] std::string cudnn_conv_support(const std::string& device_properties, const ConvGeometry& geometry, int64_t B, int64_t I,
                                             int64_t O, DType dtype);
}  // namespace cuda

/// The windows side by side: x [B, HW, C] -> columns [groups, B H'W', kh kw C / groups], what a window reads outside of the grid is 0.
MESA_KERNEL(unfold, const Tensor& x, const ConvGeometry& geometry, const Tensor& columns);
/// dx <- the sum of what each token was copied to: the gradient of unfold.
MESA_KERNEL(fold, const Tensor& columns, const ConvGeometry& geometry, const Tensor& dx);

/// y[b, place, c] <- the largest x in the place's window; which of its tokens that was, row by row, in index (u8, y's shape; the first of
/// equal ones; a NaN counts as the largest). Windows of at most 256 tokens, of which each has one in the grid: 2 padding <= kernel.
MESA_KERNEL(max_pool, const Tensor& x, const ConvGeometry& geometry, const Tensor& y, const Tensor& index);
/// dx <- the sum of dy where this token was the largest.
MESA_KERNEL(max_pool_grad, const Tensor& dy, const Tensor& index, const ConvGeometry& geometry, const Tensor& dx);

}  // namespace mesa::kernels
