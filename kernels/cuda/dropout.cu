// y = keep x / (1 - p), keep = uniform >= p: one decision an element (dropout) or a sample (drop_path).
#include "mesa/kernels/elementwise.h"
#include "pointwise.h"

namespace mesa::kernels::cuda {

namespace {

/// What both kernels share: the decision for one random word, and the factor of what is kept.
template <class A>
struct Mask {
  uint32_t threshold;
  A factor;
  __device__ A operator()(uint32_t word, A x) const { return scalar::keeps(word, threshold) ? factor * x : A(0); }
};
template <class A>
Mask<A> mask_of(double p) {
  return {scalar::dropout_threshold(p), p < 1 ? static_cast<A>(1 / (1 - p)) : A(0)};
}

/// A thread takes N consecutive elements, a multiple of the four that share one call of the generator.
template <bool kPacked, int N, class X, class Y>
__global__ void dropout_kernel(int64_t n, Mask<Acc<X>> mask, RandomKey key, const X* x, Y* y) {
  static_assert(N % 4 == 0);
  const uint64_t step = key.now();
  for (int64_t i = global_index() * N; i < n; i += global_stride() * N) {
    const bool whole = kPacked && i + N <= n;
    Acc<X> v[N] = {};
    if (whole) {
      load_pack(x + i, v);
    } else {
#pragma unroll
      for (int k = 0; k < N; ++k)
        if (i + k < n) v[k] = load(x + i + k);
    }
#pragma unroll
    for (int k = 0; k < N; k += 4) {
      const Philox4 random = philox((static_cast<uint64_t>(i + k) + key.first) / 4, step, key.key);
#pragma unroll
      for (int j = 0; j < 4; ++j) v[k + j] = mask(random.word[j], v[k + j]);
    }
    if (whole) {
      store_pack(y + i, v);
    } else {
#pragma unroll
      for (int k = 0; k < N; ++k)
        if (i + k < n) store(y + i + k, v[k]);
    }
  }
}

/// random_word without an index into registers, which would send them through memory.
__device__ inline uint32_t word_of(RandomKey key, uint64_t i) {
  i += key.first;
  const Philox4 random = philox(i / 4, key.now(), key.key);
  const uint32_t even = i & 2 ? random.word[2] : random.word[0], odd = i & 2 ? random.word[3] : random.word[1];
  return i & 1 ? odd : even;
}

/// Packs never cross samples: N divides `sample`.
template <int N, class X, class Y>
__global__ void drop_path_kernel(int64_t n, int64_t sample, Mask<Acc<X>> mask, RandomKey key, const X* x, Y* y) {
  for (int64_t i = global_index() * N; i < n; i += global_stride() * N) {
    auto v = elements_at<N>(x + i);
    const uint32_t word = word_of(key, static_cast<uint64_t>(i) / static_cast<uint64_t>(sample));
#pragma unroll
    for (int k = 0; k < N; ++k) v.v[k] = mask(word, v.v[k]);
    store_pack(y + i, v.v);
  }
}

}  // namespace

void dropout(const Tensor& x, const Tensor& y, double p, RandomKey key) {
  check_alike(x, y, "dropout");
  check(p >= 0 && p <= 1, "dropout: the probability ", p, " is not in [0, 1]");
  check_first(key);
  const int64_t n = x.numel();
  if (n == 0) return;
  dispatch(x.dtype(), y.dtype(), [&](auto tx, auto ty) {
    using X = decltype(tx);
    using Y = decltype(ty);
    constexpr int N = std::max(4, kLaneElements<X, Y>);
    const X* px = x.data<X>();
    Y* py = y.data<Y>();
    const bool packed = kLaneElements<X, Y> == N && aligned(px, N * sizeof(X)) && aligned(py, N * sizeof(Y));
    launch("dropout", packed ? &dropout_kernel<true, N, X, Y> : &dropout_kernel<false, 4, X, Y>,
           grid_for(n, (packed ? N : 4) * kMapThreads, kMapBlocks), kMapThreads, 0, n, mask_of<Acc<X>>(p), key, px, py);
  });
}

void drop_path(const Tensor& x, const Tensor& y, double p, RandomKey key) {
  check_alike(x, y, "drop_path");
  check(x.rank() >= 1, "drop_path needs an axis of samples");
  check(p >= 0 && p <= 1, "drop_path: the probability ", p, " is not in [0, 1]");
  const int64_t n = x.numel();
  if (n == 0) return;
  const int64_t sample = n / x.dim(0);
  dispatch(x.dtype(), y.dtype(), [&](auto tx, auto ty) {
    using X = decltype(tx);
    using Y = decltype(ty);
    constexpr int N = kLaneElements<X, Y>;
    const X* px = x.data<X>();
    Y* py = y.data<Y>();
    const bool packed = sample % N == 0 && aligned(px, N * sizeof(X)) && aligned(py, N * sizeof(Y));
    launch("drop_path", packed ? &drop_path_kernel<N, X, Y> : &drop_path_kernel<1, X, Y>,
           grid_for(n, (packed ? N : 1) * kMapThreads, kMapBlocks), kMapThreads, 0, n, sample, mask_of<Acc<X>>(p), key, px, py);
  });
}

}  // namespace mesa::kernels::cuda
