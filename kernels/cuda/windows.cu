// Windows of a grid as rows that lie together, and back; scale s + bias by relative position, and the sum of gradients for each distance.
#include "divider.h"
#include "mesa/kernels/windows_common.h"
#include "pointwise.h"

namespace mesa::kernels::cuda {

namespace {

constexpr int kMovedRows = 64;  // of a block, which looks up where each lies

/// Rows of the grid and of its windows, in packs of `across` a row.
template <class T, bool gather>
__global__ void move_windows_kernel(int64_t rows, Divider across, Windows w, int64_t first, T* grid, int64_t stride, T* windowed) {
  __shared__ int64_t places[kMovedRows];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kMovedRows;
  const uint32_t count = rows - begin < kMovedRows ? static_cast<uint32_t>(rows - begin) : kMovedRows;
  if (threadIdx.x < count) {
    const int64_t row = begin + threadIdx.x, window = first + row / w.length(), image = window / w.count();
    const int token = w.token(static_cast<int>(window - image * w.count()), static_cast<int>(row % w.length()));
    places[threadIdx.x] = (image * w.tokens() + token) * stride;
  }
  __syncthreads();
  windowed += begin * across.divisor;
#pragma unroll 4
  for (uint32_t i = threadIdx.x; i < count * across.divisor; i += kMapThreads) {
    const uint32_t row = across.quotient(i);
    T* const there = grid + places[row] + (i - row * across.divisor);
    if constexpr (gather)
      windowed[i] = *there;
    else
      *there = windowed[i];
  }
}

/// 16 bytes at a time where both lie so.
template <bool gather>
void move_windows(const char* name, const Tensor& grid, const Tensor& windowed, const Windows& w, int64_t first) {
  check_windowed(grid, windowed, w, first, name);
  check(grid.has_uniform_rows(), name, ": the rows of ", grid.shape(), " do not lie at one distance");
  const int64_t width = grid.dim(2) * size_of(grid.dtype()), stride = grid.row_stride() * size_of(grid.dtype());
  const auto run = [&](auto unit) {
    using T = decltype(unit);
    const int64_t across = width / sizeof(T), rows = windowed.dim(0) * windowed.dim(1);
    check(across < (int64_t{1} << 31) / kMovedRows, name, ": rows of ", across, " packs");
    if (rows * across > 0)
      launch(name, &move_windows_kernel<T, gather>, static_cast<unsigned>(ceil_div(rows, kMovedRows)), kMapThreads, 0, rows,
             Divider(across), w, first, static_cast<T*>(grid.raw()), static_cast<int64_t>(stride / sizeof(T)),
             static_cast<T*>(windowed.raw()));
  };
  if (width % 16 == 0 && stride % 16 == 0 && aligned(grid.raw(), 16) && aligned(windowed.raw(), 16))
    run(uint4{});
  else
    dispatch_float(grid.dtype(), run);
}

template <class A>
__global__ void expand_bias_kernel(int64_t elements, int heads, Windows w, const A* table, A* bias) {
  const int n = w.length();
  for (int64_t i = global_index(); i < elements; i += global_stride()) {
    const int u = static_cast<int>(i % n), t = static_cast<int>(i / n % n), h = static_cast<int>(i / n / n);
    bias[i] = table[(w.position(t) - w.position(u) + w.origin()) * heads + h];
  }
}

template <class A>
__global__ void expand_bias_grad_kernel(int64_t elements, int heads, Windows w, double factor, const A* dbias, A* dtable, bool accumulate) {
  const int64_t n = w.length();
  for (int64_t i = global_index(); i < elements; i += global_stride()) {
    const int64_t h = i % heads;
    double sum = 0;
    w.each_pair(static_cast<int>(i / heads), [&](int t, int u) { sum += dbias[(h * n + t) * n + u]; });
    dtable[i] = static_cast<A>(factor * sum + (accumulate ? static_cast<double>(dtable[i]) : 0.0));
  }
}

template <class S, class Y>
__global__ void add_window_bias_kernel(int64_t elements, int64_t heads, Windows w, int64_t first, Acc<S> scale, const S* s,
                                       const Acc<S>* bias, Y* y) {
  const int64_t n = w.length();
  for (int64_t i = global_index(); i < elements; i += global_stride()) {
    const int64_t row = i / n, u = i - row * n, t = row % n, sequence = row / n / heads;
    const int window = static_cast<int>((first + sequence) % w.count());
    const bool hidden = w.divided(window) && w.region(window, static_cast<int>(t)) != w.region(window, static_cast<int>(u));
    store(y + i, hidden ? Acc<S>(kHidden) : scale * load(s + i) + bias[i - sequence * heads * n * n]);
  }
}

}  // namespace

void gather_windows(const Tensor& x, const Windows& windows, int64_t first, const Tensor& y) {
  move_windows<true>("gather_windows", x, y, windows, first);
}

void scatter_windows(const Tensor& y, const Windows& windows, int64_t first, const Tensor& x) {
  move_windows<false>("scatter_windows", x, y, windows, first);
}

void expand_bias(const Tensor& table, const Windows& w, const Tensor& bias) {
  check_bias(table, w, bias, "expand_bias");
  dispatch_wide(table.dtype(), [&](auto tag) {
    using A = decltype(tag);
    launch("expand_bias", &expand_bias_kernel<A>, grid_for(bias.numel(), kMapThreads, kMapBlocks), kMapThreads, 0, bias.numel(),
           static_cast<int>(bias.dim(0)), w, table.data<A>(), bias.data<A>());
  });
}

void expand_bias_grad(const Tensor& dbias, const Windows& w, double factor, const Tensor& dtable, bool accumulate) {
  check_bias(dtable, w, dbias, "expand_bias_grad");
  dispatch_wide(dbias.dtype(), [&](auto tag) {
    using A = decltype(tag);
    launch("expand_bias_grad", &expand_bias_grad_kernel<A>, grid_for(dtable.numel(), kMapThreads, kMapBlocks), kMapThreads, 0,
           dtable.numel(), static_cast<int>(dbias.dim(0)), w, factor, dbias.data<A>(), dtable.data<A>(), accumulate);
  });
}

void add_window_bias(const Tensor& s, double scale, const Tensor& bias, const Windows& w, int64_t first, const Tensor& y) {
  check_scores(s, bias, w, first, y);
  if (s.numel() == 0) return;
  dispatch(s.dtype(), y.dtype(), [&](auto ts, auto ty) {
    using S = decltype(ts);
    using Y = decltype(ty);
    launch("add_window_bias", &add_window_bias_kernel<S, Y>, grid_for(s.numel(), kMapThreads, kMapBlocks), kMapThreads, 0, s.numel(),
           bias.dim(0), w, first, static_cast<Acc<S>>(scale), s.data<S>(), bias.data<Acc<S>>(), y.data<Y>());
  });
}

}  // namespace mesa::kernels::cuda
