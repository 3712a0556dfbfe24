// What kernels of windows of every backend check of their arguments.
#pragma once
#include "mesa/kernels/common.h"
#include "mesa/kernels/windows.h"

namespace mesa::kernels::MESA_ISA {
namespace {

/// A grid [B, N, C] and windows first.. of it, [W, n, C].
inline void check_windowed(const Tensor& grid, const Tensor& windowed, const Windows& w, int64_t first, const char* name) {
  check(grid.rank() == 3 && windowed.rank() == 3 && grid.dim(2) == windowed.dim(2) && grid.dtype() == windowed.dtype() &&
            windowed.is_contiguous(),
        name, ": windows ", windowed.shape(), " of a grid ", grid.shape());
  w.validate(grid.dim(1));
  check(windowed.dim(1) == w.length() && first >= 0 && first + windowed.dim(0) <= grid.dim(0) * w.count(), name, ": windows ",
        windowed.shape(), " from ", first, " on of a grid ", grid.shape());
}

/// A table [distances, H] and its layout by pairs [H, n, n].
inline void check_bias(const Tensor& table, const Windows& w, const Tensor& bias, const char* name) {
  check(table.rank() == 2 && bias.rank() == 3 && table.shape() == Shape({w.distances(), bias.dim(0)}) &&
            bias.shape() == Shape({table.dim(1), w.length(), w.length()}) && table.dtype() == bias.dtype() && table.is_contiguous() &&
            bias.is_contiguous(),
        name, ": a table of ", table.shape(), " and biases of ", bias.shape(), " for windows of ", w.window_height, " x ", w.window_width);
}

inline void check_scores(const Tensor& s, const Tensor& bias, const Windows& w, int64_t first, const Tensor& y) {
  check_alike(s, y, "add_window_bias");
  check(s.rank() == 4 && bias.rank() == 3 && bias.is_contiguous() &&
            s.shape() == Shape({s.dim(0), bias.dim(0), bias.dim(1), bias.dim(2)}) && bias.dim(1) == w.length() &&
            bias.dim(2) == w.length() && first >= 0,
        "add_window_bias: biases of ", bias.shape(), " for scores of ", s.shape());
}

}  // namespace
}  // namespace mesa::kernels::MESA_ISA
