// y <- x between any two strided layouts and floating dtypes.
#include <limits>

#include "divider.h"
#include "mesa/kernels/elementwise.h"
#include "pointwise.h"

namespace mesa::kernels::cuda {

namespace {

struct Axis {
  int64_t extent, x_stride, y_stride;
  Divider by_extent{};  ///< where items are counted in 32 bits
};
/// Axes that visit the elements in y's memory order, the innermost last.
struct Walk {
  Axis axis[Shape::kMaxRank];
  int rank = 0;

  Axis& inner() { return axis[rank - 1]; }
  void push(Axis a) { axis[rank++] = a; }
  Axis take(int i) {
    const Axis taken = axis[i];
    std::copy(axis + i + 1, axis + rank, axis + i);
    --rank;
    return taken;
  }
  /// For walks of less than 2^31 items.
  void prepare() {
    for (int i = 0; i < rank; ++i) axis[i].by_extent = Divider(axis[i].extent);
  }
  int64_t items() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= axis[i].extent;
    return n;
  }
};

/// The fewest such axes: sorted, and merged where two are one in both layouts.
Walk plan(const Tensor& x, const Tensor& y) {
  Walk sorted, merged;
  for (int i = 0; i < x.rank(); ++i)
    if (x.dim(i) != 1) sorted.push({x.dim(i), x.strides()[i], y.strides()[i]});
  std::stable_sort(sorted.axis, sorted.axis + sorted.rank, [](const Axis& a, const Axis& b) { return a.y_stride > b.y_stride; });
  for (int i = 0; i < sorted.rank; ++i) {
    const Axis a = sorted.axis[i];
    if (merged.rank > 0 && merged.inner().x_stride == a.x_stride * a.extent && merged.inner().y_stride == a.y_stride * a.extent)
      merged.inner() = {merged.inner().extent * a.extent, a.x_stride, a.y_stride};
    else
      merged.push(a);
  }
  if (merged.rank == 0) merged.push({1, 1, 1});
  return merged;
}

struct Place {
  int64_t x, y;
};
/// Where item number `item` of a walk lies. Index is 32 bits wide where that is enough: its divisions are multiplications.
template <class Index>
__device__ inline Place place_of(const Walk& walk, Index item) {
  Place at{0, 0};
  for (int i = walk.rank - 1; i >= 0; --i) {
    const Axis& axis = walk.axis[i];
    const auto extent = static_cast<Index>(axis.extent);
    Index rest = 0;
    if constexpr (sizeof(Index) == 4)
      rest = axis.by_extent.quotient(item);
    else if (i > 0)
      rest = item / extent;
    const auto index = static_cast<int64_t>(item - rest * extent);
    at.x += index * axis.x_stride;
    at.y += index * axis.y_stride;
    item = rest;
  }
  return at;
}

struct Identity {
  template <class A>
  __device__ A operator()(A x) const {
    return x;
  }
};

// --- any layout: items of N elements that lie together on both sides ---------------------------------------------------------------

template <int N, class Index, class X, class Y>
__global__ void copy_kernel(Index items, Walk walk, const X* x, Y* y) {
  for (auto item = static_cast<Index>(global_index()); item < items; item += static_cast<Index>(global_stride())) {
    const Place at = place_of(walk, item);
    store_pack(y + at.y, elements_at<N>(x + at.x).v);
  }
}

template <int N, class X, class Y>
void copy_items(Walk walk, const X* x, Y* y) {
  if constexpr (N > 1) walk.inner() = {walk.inner().extent / N, N, N};
  const int64_t items = walk.items();
  const unsigned grid = grid_for(items, kMapThreads, kMapBlocks);
  walk.prepare();
  if (items < std::numeric_limits<int32_t>::max())
    launch("copy", &copy_kernel<N, uint32_t, X, Y>, grid, kMapThreads, 0, items, walk, x, y);
  else
    launch("copy", &copy_kernel<N, uint64_t, X, Y>, grid, kMapThreads, 0, items, walk, x, y);
}

/// True if every row of the walk begins, and is cut, at multiples of `n` elements on both sides.
template <class X, class Y>
bool allows_packs(const Walk& walk, int n, const X* x, const Y* y) {
  bool fits = aligned(x, n * sizeof(X)) && aligned(y, n * sizeof(Y)) && walk.axis[walk.rank - 1].extent % n == 0;
  for (int i = 0; i < walk.rank - 1; ++i) fits = fits && walk.axis[i].x_stride % n == 0 && walk.axis[i].y_stride % n == 0;
  return fits;
}

/// Rows that are contiguous on both sides, at any distances.
template <class X, class Y>
void copy_rows(const Walk& walk, const X* x, Y* y) {
  constexpr int N = kLaneElements<X, Y>, kHalf = std::max(1, N / 2);
  if (walk.rank == 1)
    map("copy", Identity{}, walk.axis[0].extent, y, x);
  else if (allows_packs(walk, N, x, y))
    copy_items<N>(walk, x, y);
  else if (allows_packs(walk, kHalf, x, y))
    copy_items<kHalf>(walk, x, y);
  else
    copy_items<1>(walk, x, y);
}

// --- transposes ------------------------------------------------------------------------------------------------------------------

constexpr int kTile = 64, kTileThreads = 256;

/// A tile passes through shared memory, so that both sides move along their own contiguous axis: `across` is x's, `along` is y's.
/// One block for each tile of each item of `batch`.
template <class X, class Y>
__global__ void transpose_kernel(Walk batch, Axis across, Axis along, const X* x, Y* y) {
  __shared__ Acc<X> tile[kTile][kTile + 1];  // one more: the columns of a tile then begin in different banks
  const int64_t tiles_across = (across.extent + kTile - 1) / kTile, tiles_along = (along.extent + kTile - 1) / kTile;
  const int64_t tile_number = static_cast<int64_t>(blockIdx.x) / tiles_across;
  const int64_t r0 = static_cast<int64_t>(blockIdx.x) % tiles_across * kTile, c0 = tile_number % tiles_along * kTile;
  const Place at = place_of(batch, static_cast<uint64_t>(tile_number / tiles_along));
  const int lane = threadIdx.x % kTile, first = threadIdx.x / kTile;
  constexpr int kStep = kTileThreads / kTile;
#pragma unroll
  for (int i = 0; i < kTile; i += kStep)
    if (const int64_t r = r0 + lane, c = c0 + first + i; r < across.extent && c < along.extent)
      tile[first + i][lane] = load(x + at.x + c * along.x_stride + r);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTile; i += kStep)
    if (const int64_t r = r0 + first + i, c = c0 + lane; r < across.extent && c < along.extent)
      store(y + at.y + r * across.y_stride + c, tile[lane][first + i]);
}

template <class X, class Y>
void transpose(const Walk& batch, const Axis& across, const Axis& along, const X* x, Y* y) {
  const int64_t blocks = batch.items() * ceil_div(across.extent, kTile) * ceil_div(along.extent, kTile);
  launch("copy (transpose)", &transpose_kernel<X, Y>, static_cast<unsigned>(blocks), kTileThreads, 0, batch, across, along, x, y);
}

/// The axis that is contiguous in x, if a tile of it and of the innermost axis is worth its way; otherwise -1.
int transposed_axis(const Walk& walk) {
  constexpr int64_t kWorth = kTile / 4;
  const Axis& inner = walk.axis[walk.rank - 1];
  for (int i = 0; i < walk.rank - 1; ++i)
    if (walk.axis[i].x_stride == 1 && inner.y_stride == 1 && walk.axis[i].extent >= kWorth && inner.extent >= kWorth) return i;
  return -1;
}

}  // namespace

void copy(const Tensor& x, const Tensor& y) {
  check(x.shape() == y.shape(), "copy: tensors of shapes ", x.shape(), " and ", y.shape());
  if (x.numel() == 0) return;
  const Walk walk = plan(x, y);
  const Axis& inner = walk.axis[walk.rank - 1];
  const int across = transposed_axis(walk);
  dispatch_float(x.dtype(), [&](auto tx) {
    dispatch_float(y.dtype(), [&](auto ty) {
      const auto* px = x.data<decltype(tx)>();
      auto* py = y.data<decltype(ty)>();
      if (inner.x_stride == 1 && inner.y_stride == 1)
        copy_rows(walk, px, py);
      else if (across >= 0) {
        Walk batch = walk;
        const Axis along = batch.take(batch.rank - 1), beside = batch.take(across);
        transpose(batch, beside, along, px, py);
      } else
        copy_items<1>(walk, px, py);
    });
  });
}

}  // namespace mesa::kernels::cuda
