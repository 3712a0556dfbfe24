// y[i] = f(a[i], b[i], ...) over contiguous memory of any floating dtypes, 16 bytes a lane.
#pragma once
#include "cuda.h"

namespace mesa::kernels::cuda {
namespace {

inline constexpr int kMapThreads = 256;
inline constexpr int64_t kMapBlocks = 1 << 20;  // short blocks, as many as it takes: the last wave is then short, too

/// Elements that a lane moves at once: 16 bytes of the widest type. f64 is there to be right and goes one by one.
template <class... T>
inline constexpr int kLaneElements = std::max({sizeof(T)...}) == 8 ? 1 : static_cast<int>(16 / std::max({sizeof(T)...}));

template <class A, int N>
struct Elements {
  A v[N];
};
template <int N, class T>
__device__ inline Elements<Acc<T>, N> elements_at(const T* p) {
  Elements<Acc<T>, N> x;
  load_pack(p, x.v);
  return x;
}
template <int N, class F, class... A>
__device__ inline auto apply(const F& f, const Elements<A, N>&... x) {
  Elements<decltype(f(x.v[0]...)), N> y;
#pragma unroll
  for (int k = 0; k < N; ++k) y.v[k] = f(x.v[k]...);
  return y;
}

/// store_pack to global memory, by one instruction: an assignment nvcc takes apart into elements where it stands behind another.
template <class T, int N, class V>
__device__ inline void store_whole(T* p, const V (&x)[N]) {
  constexpr size_t kBytes = N * sizeof(T);
  using Word = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, uint32_t>>;
  if constexpr (N > 1 && kBytes == sizeof(Word)) {
    const Pack<T, N> pack = pack_of<T>(x);
    Word word;
    memcpy(&word, &pack, sizeof word);
    store_global(reinterpret_cast<Word*>(p), word);
  } else {
    store_pack(p, x);
  }
}

/// This thread's packs of N elements below n, those of the grid's threads behind each other. y may be one of x: an element is read before
/// its own place is written.
template <int N, class F, class Y, class... X>
__device__ inline void map_packs(int64_t n, const F& f, Y* y, const X*... x) {
  const int64_t stride = global_stride() * N;
  int64_t i = global_index() * N;
  for (; i + stride + N <= n; i += 2 * stride) {  // two packs at a time: the loads of both are under way before the first store
    const auto low = apply<N>(f, elements_at<N>(x + i)...), high = apply<N>(f, elements_at<N>(x + i + stride)...);
    store_whole(y + i, low.v);
    store_whole(y + i + stride, high.v);
  }
  if (i + N <= n) store_whole(y + i, apply<N>(f, elements_at<N>(x + i)...).v);
}
template <int N, class F, class Y, class... X>
__global__ void map_kernel(int64_t n, F f, Y* y, const X*... x) {
  map_packs<N>(n, f, y, x...);
  if (const int64_t last = n / N * N + global_index(); N > 1 && last < n) store(y + last, f(load(x + last)...));
}

/// y[i] <- f(x[i]...) for n elements, in packs if every address is a multiple of its pack.
template <class F, class Y, class... X>
void map(const char* name, const F& f, int64_t n, Y* y, const X*... x) {
  if (n == 0) return;
  constexpr int N = kLaneElements<Y, X...>;
  const bool packed = aligned(y, N * sizeof(Y)) && (aligned(x, N * sizeof(X)) && ...);
  const int step = packed ? N : 1;
  void (*const kernel)(int64_t, F, Y*, const X*...) = packed ? &map_kernel<N, F, Y, X...> : &map_kernel<1, F, Y, X...>;
  launch(name, kernel, grid_for(n, 2 * step * kMapThreads, kMapBlocks), kMapThreads, 0, n, f, y, x...);
}

/// y[r, c] <- f(r)(x[r, c]...) for rows of `width`, a whole number of packs: few long ones or many short ones. blockIdx.y goes over rows.
template <int N, class F, class Y, class... X>
__global__ void map_rows_kernel(int64_t rows, int64_t width, F f, Y* y, const X*... x) {
  for (int64_t r = blockIdx.y; r < rows; r += gridDim.y) map_packs<N>(width, f(r), y + r * width, x + r * width...);
}
template <class F, class Y, class... X>
void map_rows(const char* name, const F& f, int64_t rows, int64_t width, Y* y, const X*... x) {
  if (rows * width == 0) return;
  constexpr int N = kLaneElements<Y, X...>;
  const bool packed = width % N == 0 && aligned(y, N * sizeof(Y)) && (aligned(x, N * sizeof(X)) && ...);
  void (*const kernel)(int64_t, int64_t, F, Y*, const X*...) = packed ? &map_rows_kernel<N, F, Y, X...> : &map_rows_kernel<1, F, Y, X...>;
  const int64_t packs = width / (packed ? N : 1), threads = std::clamp<int64_t>(ceil_div(packs, 2 * kWarp) * kWarp, kWarp, kMapThreads);
  const dim3 grid(grid_for(packs, 4 * threads, kMapBlocks), static_cast<unsigned>(std::min<int64_t>(rows, 65535)));
  launch(name, kernel, grid, static_cast<unsigned>(threads), 0, rows, width, f, y, x...);
}

/// A loop over packs, `across` in each row, by strides of whole rows: a thread keeps its columns, and in registers what belongs to them.
struct ColumnLoop {
  int64_t packs, stride, first, column;  ///< column: pack of a row

  __device__ ColumnLoop(int64_t packs, int64_t across)
      : packs(packs), stride(global_stride() / across * across), first(global_index()), column(first % across) {}
  /// False in the threads that are left over.
  __device__ bool takes_part() const { return first < stride; }
  /// use(i, load(i)) for this thread's packs, two at a time: both are loaded before the first is used.
  template <class Load, class Use>
  __device__ void each(const Load& load, const Use& use) const {
    int64_t i = first;
    for (; i + stride < packs; i += 2 * stride) {
      auto low = load(i), high = load(i + stride);
      use(i, low);
      use(i + stride, high);
    }
    if (i < packs) {
      auto last = load(i);
      use(i, last);
    }
  }
  static unsigned grid(int64_t packs, int64_t across) {  // at least one row
    return static_cast<unsigned>(std::max<int64_t>(grid_for(packs, 2 * kMapThreads), ceil_div(across, kMapThreads)));
  }
};

/// y[i] <- f(x[i]...) for tensors of one shape.
template <class F>
void map(const char* name, const F& f, const Tensor& x, const Tensor& y) {
  check_alike(x, y, name);
  dispatch(x.dtype(), y.dtype(), [&](auto tx, auto ty) { map(name, f, y.numel(), y.data<decltype(ty)>(), x.data<decltype(tx)>()); });
}
template <class F>
void map(const char* name, const F& f, const Tensor& a, const Tensor& b, const Tensor& y) {
  check_alike(a, b, name);
  check_alike(a, y, name);
  dispatch(a.dtype(), b.dtype(), y.dtype(), [&](auto ta, auto tb, auto ty) {
    map(name, f, y.numel(), y.data<decltype(ty)>(), a.data<decltype(ta)>(), b.data<decltype(tb)>());
  });
}

}  // namespace
}  // namespace mesa::kernels::cuda
