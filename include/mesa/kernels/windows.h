// Windows of a grid of tokens that attend among themselves, shifted and with a bias by relative position (Liu et al., ICCV 2021, "Swin").
#pragma once
#include "mesa/base/dtype.h"
#include "mesa/kernels/kernel.h"

// Forced inlining: kernels of several instruction sets include this, and one shared copy must never serve the others.
#define MESA_MEMBER [[gnu::always_inline]] MESA_HD

namespace mesa::kernels {

/// How a grid of height x width tokens, row by row, falls into windows that do not overlap. The grid is first turned by the shift
/// (cyclically, towards its beginning); tokens that met only by that belong to different regions of a window, and do not see each other. A
/// grid may be padded at its end: only the first inner_height x inner_width tokens are turned, the others stay where they are.
struct Windows {
  int height = 0, width = 0;  ///< multiples of the window's
  int window_height = 0, window_width = 0;
  int shift_y = 0, shift_x = 0;           ///< below the window's extents
  int inner_height = 0, inner_width = 0;  ///< without padding

  bool defined() const { return height > 0; }
  MESA_MEMBER int across() const { return width / window_width; }
  MESA_MEMBER int count() const { return height / window_height * across(); }  ///< windows of an image
  MESA_MEMBER int length() const { return window_height * window_width; }      ///< tokens of a window
  MESA_MEMBER int64_t tokens() const { return static_cast<int64_t>(height) * width; }

  /// The grid's token at place t of window w.
  MESA_MEMBER int token(int w, int t) const {
    const int y = w / across() * window_height + t / window_width, x = w % across() * window_width + t % window_width;
    if (y >= inner_height || x >= inner_width) return y * width + x;
    return (y + shift_y) % inner_height * width + (x + shift_x) % inner_width;
  }
  /// Places of a window see each other if they are of one region.
  MESA_MEMBER int region(int w, int t) const {
    return 3 * band(w / across() * window_height + t / window_width, height, window_height, shift_y) +
           band(w % across() * window_width + t % window_width, width, window_width, shift_x);
  }
  /// True if the window has more than one region.
  MESA_MEMBER bool divided(int w) const {
    return (shift_y > 0 && w / across() == height / window_height - 1) || (shift_x > 0 && w % across() == across() - 1);
  }
  /// Rows of the table of biases: one for each distance of two places.
  MESA_MEMBER int distances() const { return (2 * window_height - 1) * (2 * window_width - 1); }
  /// The row for places t and u is position(t) - position(u) + origin().
  MESA_MEMBER int position(int t) const { return t / window_width * (2 * window_width - 1) + t % window_width; }
  MESA_MEMBER int origin() const { return position(length() - 1); }

  /// f(t, u) for each pair of places at this distance (a row of the table), in order of t.
  template <class F>
  MESA_MEMBER void each_pair(int distance, F&& f) const {
    const int dy = distance / (2 * window_width - 1) - window_height + 1, dx = distance % (2 * window_width - 1) - window_width + 1;
    for (int y = dy > 0 ? dy : 0; y < window_height && y - dy < window_height; ++y)
      for (int x = dx > 0 ? dx : 0; x < window_width && x - dx < window_width; ++x)
        f(y * window_width + x, (y - dy) * window_width + x - dx);
  }
  /// Throws Error unless the windows tile a grid of `tokens` tokens.
  void validate(int64_t tokens) const;  // src/kernels/windows.cpp

 private:
  MESA_MEMBER static int band(int at, int extent, int window, int shift) { return at < extent - window ? 0 : at < extent - shift ? 1 : 2; }
};
#undef MESA_MEMBER

/// Windows with what a fused attention adds to their scores, and where the gradient of that goes.
struct WindowBias {
  Windows windows;
  Tensor table;             ///< [distances, H], f32 (f64 for f64)
  Tensor d_table;           ///< backward: of the table's shape, or undefined
  bool accumulate = false;  ///< adds to d_table

  bool defined() const { return windows.defined(); }
};

// Windows are numbered image by image; a range of them begins at number `first`.

/// y [W, n, C] <- the tokens of windows first..first+W-1 of x [B, N, C]; x uniform rows, y contiguous, of one dtype.
MESA_KERNEL(gather_windows, const Tensor& x, const Windows& windows, int64_t first, const Tensor& y);
/// The inverse: the tokens of x [B, N, C] that lie in these windows <- y [W, n, C].
MESA_KERNEL(scatter_windows, const Tensor& y, const Windows& windows, int64_t first, const Tensor& x);
/// bias [H, n, n] <- table [distances, H], laid out by pairs of places. f32 or f64.
MESA_KERNEL(expand_bias, const Tensor& table, const Windows& windows, const Tensor& bias);
/// dtable [distances, H] <- (+) factor times the sum of dbias [H, n, n] over the pairs of each distance, in a fixed order.
MESA_KERNEL(expand_bias_grad, const Tensor& dbias, const Windows& windows, double factor, const Tensor& dtable, bool accumulate);
/// The score of places that do not see each other: no probability is left of it, and yet it is a number, which nothing takes for a fault.
inline constexpr float kHidden = -1e30f;
/// y [W, H, n, n] <- scale s + bias [H, n, n], kHidden where two places do not see each other; y may be s. s, y f32|bf16|f64, contiguous.
MESA_KERNEL(add_window_bias, const Tensor& s, double scale, const Tensor& bias, const Windows& windows, int64_t first, const Tensor& y);

}  // namespace mesa::kernels
