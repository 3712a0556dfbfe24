// columns[g, (b, place), (tap, c)] = x[b, token of the tap, g C/groups + c], 0 outside of the grid, and its gradient;
// y[b, place, c] = max over the taps of x, and its gradient by the tap that it was.
#include "divider.h"
#include "mesa/kernels/conv_common.h"
#include "pointwise.h"

namespace mesa::kernels::cuda {
namespace {

/// Which token a tap of a window reads. Indices of tokens and places are below 2^31.
struct Taps {
  int height, width, out_height, out_width, kernel_height, kernel_width, stride, padding, dilation;
  Divider by_width, by_out_width, by_kernel_width, by_stride, by_dilation, by_tokens, by_places;

  explicit Taps(const ConvGeometry& g)
      : height(static_cast<int>(g.height)),
        width(static_cast<int>(g.width)),
        out_height(static_cast<int>(g.out_height())),
        out_width(static_cast<int>(g.out_width())),
        kernel_height(static_cast<int>(g.kernel_height)),
        kernel_width(static_cast<int>(g.kernel_width)),
        stride(static_cast<int>(g.stride)),
        padding(static_cast<int>(g.padding)),
        dilation(static_cast<int>(g.dilation)),
        by_width(g.width),
        by_out_width(g.out_width()),
        by_kernel_width(g.kernel_width),
        by_stride(g.stride),
        by_dilation(g.dilation),
        by_tokens(g.height * g.width),
        by_places(g.out_height() * g.out_width()) {}

  /// The token in its image, or -1.
  __device__ int token(uint32_t place, uint32_t tap) const {
    const int row = static_cast<int>(by_out_width.quotient(place)), column = static_cast<int>(by_out_width.remainder(place));
    const int down = static_cast<int>(by_kernel_width.quotient(tap)), right = static_cast<int>(by_kernel_width.remainder(tap));
    const int y = row * stride - padding + down * dilation, x = column * stride - padding + right * dilation;
    return y < 0 || y >= height || x < 0 || x >= width ? -1 : y * width + x;
  }
  MESA_HD int taps() const { return kernel_height * kernel_width; }

  /// f(token, tap) for the taps of a window that lie in the image, in order.
  template <class F>
  __device__ void each_token(uint32_t place, const F& f) const {
    const int top = static_cast<int>(by_out_width.quotient(place)) * stride - padding;
    const int left = static_cast<int>(by_out_width.remainder(place)) * stride - padding;
    for (int down = 0; down < kernel_height; ++down) {
      const int y = top + down * dilation;
      if (y < 0 || y >= height) continue;
      for (int right = 0; right < kernel_width; ++right) {
        const int x = left + right * dilation;
        if (x >= 0 && x < width) f(y * width + x, down * kernel_width + right);
      }
    }
  }

  /// Windows along one axis that may read position `at` (from the padding's begin on): the last, and the first beyond it on the way back.
  struct Reach {
    int last, end;
  };
  __device__ Reach reach(int at, int kernel, int windows) const {
    const int last = static_cast<int>(by_stride.quotient(static_cast<uint32_t>(at))), before = at - (kernel - 1) * dilation;
    const int first = before > 0 ? static_cast<int>(by_stride.quotient(static_cast<uint32_t>(before + stride - 1))) : 0;
    return {min(last, windows - 1), first - 1};
  }
  /// f(place, tap) for the windows that read a token, by taps in order.
  template <class F>
  __device__ void each_place(uint32_t token, const F& f) const {
    const int y = static_cast<int>(by_width.quotient(token)) + padding, x = static_cast<int>(by_width.remainder(token)) + padding;
    const Reach rows = reach(y, kernel_height, out_height), columns = reach(x, kernel_width, out_width);
    for (int row = rows.last; row > rows.end; --row) {
      const int down = tap_at(y - row * stride);
      for (int column = columns.last; column > columns.end; --column) {
        const int right = tap_at(x - column * stride);
        if (down >= 0 && right >= 0) f(row * out_width + column, down * kernel_width + right);
      }
    }
  }
  /// The tap so far into a window, or -1 between two.
  __device__ int tap_at(int distance) const {
    const int tap = static_cast<int>(by_dilation.quotient(static_cast<uint32_t>(distance)));
    return tap * dilation == distance ? tap : -1;
  }
};

/// Rows cut into pieces of n channels, one for each thread; below 2^31.
struct Pieces {
  int64_t count;  ///< in all
  int across;     ///< of a row
  Divider by_across;

  Pieces(const char* name, int64_t rows, int64_t channels, int n)
      : count(rows * (channels / n)), across(static_cast<int>(channels / n)), by_across(across) {
    check(std::max(rows, count) < (int64_t{1} << 31), name, ": ", rows, " rows of ", channels, " channels are too many for one launch");
  }
  __device__ uint32_t row(int64_t i) const { return by_across.quotient(static_cast<uint32_t>(i)); }
};

/// One thread for N channels of one tap of one row.
template <int N, class X>
__global__ void unfold_kernel(Taps taps, Pieces pieces, int64_t rows, int channels, int groups, const X* x, X* columns) {
  const int across = pieces.across * N, tokens = taps.height * taps.width;
  for (int64_t i = global_index(); i < pieces.count; i += global_stride()) {
    const int64_t all = pieces.row(i);  // (group, row, tap)
    const int c = static_cast<int>(i - all * pieces.across) * N;
    const int64_t of_groups = all / taps.taps();
    const uint32_t tap = static_cast<uint32_t>(all - of_groups * taps.taps());
    const int64_t group = groups == 1 ? 0 : of_groups / rows;
    const uint32_t row = static_cast<uint32_t>(of_groups - group * rows);
    const uint32_t b = taps.by_places.quotient(row);
    const int token = taps.token(taps.by_places.remainder(row), tap);
    Elements<Acc<X>, N> v{};
    if (token >= 0) v = elements_at<N>(x + (static_cast<int64_t>(b) * tokens + token) * channels + group * across + c);
    store_pack(columns + i * N, v.v);
  }
}

template <int N, class X>
__global__ void fold_kernel(Taps taps, Pieces pieces, int64_t rows, int channels, int per_group, const X* columns, X* dx) {
  const int64_t places = static_cast<int64_t>(taps.out_height) * taps.out_width;
  for (int64_t i = global_index(); i < pieces.count; i += global_stride()) {
    const int64_t row = pieces.row(i);
    const int c = static_cast<int>(i - row * pieces.across) * N, group = c / per_group;
    const uint32_t b = taps.by_tokens.quotient(static_cast<uint32_t>(row)), token = taps.by_tokens.remainder(static_cast<uint32_t>(row));
    Elements<Acc<X>, N> sum{};
    taps.each_place(token, [&](int place, int tap) {
      const int64_t from = ((group * rows + b * places + place) * taps.taps() + tap) * per_group + (c - group * per_group);
      const auto v = elements_at<N>(columns + from);
#pragma unroll
      for (int k = 0; k < N; ++k) sum.v[k] += v.v[k];
    });
    store_pack(dx + row * channels + c, sum.v);
  }
}

template <int N, class X>
__global__ void max_pool_kernel(Taps taps, Pieces pieces, const X* x, X* y, uint8_t* index) {
  const int channels = pieces.across * N, tokens = taps.height * taps.width;
  for (int64_t i = global_index(); i < pieces.count; i += global_stride()) {
    const int64_t row = pieces.row(i);
    const int c = static_cast<int>(i - row * pieces.across) * N;
    const uint32_t b = taps.by_places.quotient(static_cast<uint32_t>(row)), place = taps.by_places.remainder(static_cast<uint32_t>(row));
    Acc<X> best[N] = {};
    int which[N] = {};
    bool first = true;
    taps.each_token(place, [&](int token, int tap) {
      const auto v = elements_at<N>(x + (static_cast<int64_t>(b) * tokens + token) * channels + c);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        // The first NaN counts as the largest: v <= best is false of it, and best == best of what follows it.
        const bool larger = first | (!(v.v[k] <= best[k]) & (best[k] == best[k]));
        best[k] = larger ? v.v[k] : best[k];
        which[k] = larger ? tap : which[k];
      }
      first = false;
    });
    Pack<uint8_t, N> index_of;
#pragma unroll
    for (int k = 0; k < N; ++k) index_of.v[k] = static_cast<uint8_t>(which[k]);
    store_pack(y + row * channels + c, best);
    *reinterpret_cast<Pack<uint8_t, N>*>(index + row * channels + c) = index_of;
  }
}

template <int N, class X>
__global__ void max_pool_grad_kernel(Taps taps, Pieces pieces, const X* dy, const uint8_t* index, X* dx) {
  const int channels = pieces.across * N;
  const int64_t places = static_cast<int64_t>(taps.out_height) * taps.out_width;
  for (int64_t i = global_index(); i < pieces.count; i += global_stride()) {
    const int64_t row = pieces.row(i);
    const int c = static_cast<int>(i - row * pieces.across) * N;
    const uint32_t b = taps.by_tokens.quotient(static_cast<uint32_t>(row)), token = taps.by_tokens.remainder(static_cast<uint32_t>(row));
    Elements<Acc<X>, N> sum{};
    taps.each_place(token, [&](int place, int tap) {
      const int64_t at = (b * places + place) * channels + c;
      const auto v = elements_at<N>(dy + at);
      const Pack<uint8_t, N> which = *reinterpret_cast<const Pack<uint8_t, N>*>(index + at);
#pragma unroll
      for (int k = 0; k < N; ++k) sum.v[k] += which.v[k] == tap ? v.v[k] : Acc<X>(0);
    });
    store_pack(dx + row * channels + c, sum.v);
  }
}

/// f(a value of the element type, the channels of a thread as a constant): 16 bytes where runs of `channels` divide into them.
template <class F>
void dispatch_pieces(const Tensor& x, int64_t channels, std::initializer_list<const void*> addresses, F&& f) {
  dispatch(x.dtype(), x.dtype(), [&](auto tag, auto) {
    using X = decltype(tag);
    constexpr int N = kLaneElements<X>;
    bool packed = channels % N == 0;
    for (const void* address : addresses) packed = packed && aligned(address, N * sizeof(X));
    if (packed)
      f(tag, std::integral_constant<int, N>{});
    else
      f(tag, std::integral_constant<int, 1>{});
  });
}

}  // namespace

void unfold(const Tensor& x, const ConvGeometry& g, const Tensor& columns) {
  check_unfolded(x, columns, g, "unfold");
  if (columns.numel() == 0) return;
  const int64_t C = x.dim(2), rows = columns.dim(1);
  dispatch_pieces(x, C / g.groups, {x.raw(), columns.raw()}, [&](auto tag, auto n) {
    using X = decltype(tag);
    const Pieces pieces("unfold", g.groups * rows * g.taps(), C / g.groups, n);
    launch("unfold", &unfold_kernel<n.value, X>, grid_for(pieces.count, kMapThreads, kMapBlocks), kMapThreads, 0, Taps(g), pieces, rows,
           static_cast<int>(C), static_cast<int>(g.groups), x.data<X>(), columns.data<X>());
  });
}

void fold(const Tensor& columns, const ConvGeometry& g, const Tensor& dx) {
  check_unfolded(dx, columns, g, "fold");
  if (dx.numel() == 0) return;
  const int64_t C = dx.dim(2), rows = columns.dim(1);
  dispatch_pieces(dx, C / g.groups, {dx.raw(), columns.raw()}, [&](auto tag, auto n) {
    using X = decltype(tag);
    const Pieces pieces("fold", dx.rows(), C, n);
    launch("fold", &fold_kernel<n.value, X>, grid_for(pieces.count, kMapThreads, kMapBlocks), kMapThreads, 0, Taps(g), pieces, rows,
           static_cast<int>(C), static_cast<int>(C / g.groups), columns.data<X>(), dx.data<X>());
  });
}

void max_pool(const Tensor& x, const ConvGeometry& g, const Tensor& y, const Tensor& index) {
  check_pooled(x, y, index, g, "max_pool");
  if (y.numel() == 0) return;
  dispatch_pieces(x, x.dim(2), {x.raw(), y.raw(), index.raw()}, [&](auto tag, auto n) {
    using X = decltype(tag);
    const Pieces pieces("max_pool", y.rows(), x.dim(2), n);
    launch("max_pool", &max_pool_kernel<n.value, X>, grid_for(pieces.count, kMapThreads, kMapBlocks), kMapThreads, 0, Taps(g), pieces,
           x.data<X>(), y.data<X>(), index.data<uint8_t>());
  });
}

void max_pool_grad(const Tensor& dy, const Tensor& index, const ConvGeometry& g, const Tensor& dx) {
  check_pooled(dx, dy, index, g, "max_pool_grad");
  if (dx.numel() == 0) return;
  dispatch_pieces(dx, dx.dim(2), {dx.raw(), dy.raw(), index.raw()}, [&](auto tag, auto n) {
    using X = decltype(tag);
    const Pieces pieces("max_pool_grad", dx.rows(), dx.dim(2), n);
    launch("max_pool_grad", &max_pool_grad_kernel<n.value, X>, grid_for(pieces.count, kMapThreads, kMapBlocks), kMapThreads, 0, Taps(g),
           pieces, dy.data<X>(), index.data<uint8_t>(), dx.data<X>());
  });
}

}  // namespace mesa::kernels::cuda
