// What kernels of sliding windows of every backend check of their arguments.
#pragma once
#include <algorithm>

#include "mesa/kernels/common.h"
#include "mesa/kernels/conv.h"

namespace mesa::kernels::MESA_ISA {
namespace {

/// A grid [B, HW, C] and its windows side by side.
inline void check_unfolded(const Tensor& grid, const Tensor& columns, const ConvGeometry& g, const char* name) {
  g.validate();
  check(grid.rank() == 3 && grid.is_contiguous() && columns.is_contiguous() && grid.dim(1) == g.height * g.width &&
            grid.dim(2) % g.groups == 0 &&
            columns.shape() == Shape({g.groups, grid.dim(0) * g.out_height() * g.out_width(), g.taps() * grid.dim(2) / g.groups}) &&
            grid.dtype() == columns.dtype(),
        name, ": a grid ", grid.shape(), " of ", g.height, " x ", g.width, " and columns ", columns.shape());
}

/// A grid, what is pooled from it, and which tokens that was.
inline void check_pooled(const Tensor& grid, const Tensor& pooled, const Tensor& index, const ConvGeometry& g, const char* name) {
  g.validate();
  check(2 * g.padding <= std::min(g.kernel_height, g.kernel_width) && g.dilation == 1 && g.taps() <= 256, name, ": windows of ",
        g.kernel_height, " x ", g.kernel_width, " with padding ", g.padding, " and dilation ", g.dilation);
  check(grid.rank() == 3 && grid.is_contiguous() && pooled.is_contiguous() && grid.dim(1) == g.height * g.width &&
            pooled.shape() == Shape({grid.dim(0), g.out_height() * g.out_width(), grid.dim(2)}) && grid.dtype() == pooled.dtype(),
        name, ": a grid ", grid.shape(), " of ", g.height, " x ", g.width, " and results ", pooled.shape());
  check(index.is_contiguous() && index.dtype() == DType::u8 && index.shape() == pooled.shape(), name, ": an index ", index.shape());
}

}  // namespace
}  // namespace mesa::kernels::MESA_ISA
