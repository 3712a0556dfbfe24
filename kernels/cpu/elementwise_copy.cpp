// y <- x between any two strided layouts and floating dtypes.
#include <array>
#include <utility>

#include "mesa/kernels/elementwise.h"

#include "cpu.h"

namespace mesa::kernels::MESA_ISA {

namespace {

struct Axis {
  int64_t extent, x_stride, y_stride;
};

/// The fewest axes that visit the elements in y's memory order; the last two are the block that the inner loops walk.
struct Walk {
  std::array<Axis, Shape::kMaxRank + 2> axis;
  int rank = 0;

  void push(Axis a) { axis[rank++] = a; }
  int64_t outer() const {
    int64_t n = 1;
    for (int i = 0; i < rank - 2; ++i) n *= axis[i].extent;
    return n;
  }
};

Walk plan(const Tensor& x, const Tensor& y) {
  Walk sorted;
  for (int i = 0; i < x.rank(); ++i)
    if (x.dim(i) != 1) sorted.push({x.dim(i), x.strides()[i], y.strides()[i]});
  std::stable_sort(sorted.axis.begin(), sorted.axis.begin() + sorted.rank,
                   [](const Axis& a, const Axis& b) { return a.y_stride > b.y_stride; });
  Walk walk;
  for (int i = 0; i < sorted.rank; ++i) {
    const Axis a = sorted.axis[i];
    Axis* last = walk.rank > 0 ? &walk.axis[walk.rank - 1] : nullptr;
    if (last && last->x_stride == a.x_stride * a.extent && last->y_stride == a.y_stride * a.extent)
      *last = {last->extent * a.extent, a.x_stride, a.y_stride};
    else walk.push(a);
  }
  Walk out;
  for (int i = walk.rank; i < 2; ++i) out.push({1, 0, 0});
  for (int i = 0; i < walk.rank; ++i) out.push(walk.axis[i]);
  // A transpose: bring the axis that is contiguous in x beside the one that is contiguous in y, so that blocks of both stay in cache.
  if (out.axis[out.rank - 1].x_stride != 1)
    for (int i = 0; i < out.rank - 2; ++i)
      if (out.axis[i].x_stride == 1) std::swap(out.axis[i], out.axis[out.rank - 2]);
  return out;
}

template <class X, class Y>
void copy_row(const X* x, int64_t x_stride, Y* y, int64_t y_stride, int64_t n) {
  if (x_stride == 1 && y_stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) store(y + i, load(x + i));
  } else {
    for (int64_t i = 0; i < n; ++i) store(y + i * y_stride, load(x + i * x_stride));
  }
}

/// rows x columns elements; strided reading goes tile by tile, so that each cache line of x is used up while it is there.
template <class X, class Y>
void copy_block(const X* x, Y* y, const Axis& rows, int64_t row_begin, int64_t row_end, const Axis& columns) {
  const int64_t tile = columns.x_stride == 1 ? columns.extent : 32;
  const int64_t row_tile = columns.x_stride == 1 ? row_end - row_begin : 32;
  for (int64_t r0 = row_begin; r0 < row_end; r0 += row_tile)
    for (int64_t c0 = 0; c0 < columns.extent; c0 += tile)
      for (int64_t r = r0; r < std::min(row_end, r0 + row_tile); ++r)
        copy_row(x + r * rows.x_stride + c0 * columns.x_stride, columns.x_stride, y + r * rows.y_stride + c0 * columns.y_stride,
                 columns.y_stride, std::min(tile, columns.extent - c0));
}

template <class X, class Y>
void copy_walk(const X* x, Y* y, const Walk& walk, int64_t begin, int64_t end) {  // of the rows: (outer, rows) pairs
  const Axis rows = walk.axis[walk.rank - 2], columns = walk.axis[walk.rank - 1];
  for (int64_t at = begin; at < end;) {
    const int64_t row = at % rows.extent, count = std::min(end - at, rows.extent - row);
    int64_t rest = at / rows.extent, x_at = 0, y_at = 0;
    for (int i = walk.rank - 3; i >= 0; --i) {
      const int64_t index = rest % walk.axis[i].extent;
      rest /= walk.axis[i].extent;
      x_at += index * walk.axis[i].x_stride;
      y_at += index * walk.axis[i].y_stride;
    }
    copy_block(x + x_at, y + y_at, rows, row, row + count, columns);
    at += count;
  }
}

}  // namespace

void copy(const Tensor& x, const Tensor& y) {
  check(x.shape() == y.shape(), "copy: tensors of shapes ", x.shape(), " and ", y.shape());
  if (x.numel() == 0) return;
  const Walk walk = plan(x, y);
  const Axis rows = walk.axis[walk.rank - 2], columns = walk.axis[walk.rank - 1];
  dispatch_float(x.dtype(), [&](auto tx) {
    dispatch_float(y.dtype(), [&](auto ty) {
      const auto* px = x.data<decltype(tx)>();
      auto* py = y.data<decltype(ty)>();
      if (walk.outer() * rows.extent == 1 && columns.x_stride == 1 && columns.y_stride == 1)
        parallel_elements(columns.extent, [=](int64_t begin, int64_t end) { copy_row(px + begin, 1, py + begin, 1, end - begin); });
      else
        parallel_rows(walk.outer() * rows.extent, columns.extent,
                      [&](int64_t begin, int64_t end) { copy_walk(px, py, walk, begin, end); });
    });
  });
}

}  // namespace mesa::kernels::MESA_ISA
