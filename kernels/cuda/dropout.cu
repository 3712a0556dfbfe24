// keep / (1 - p), keep = uniform >= p, times each element of x (dropout) or each sample of a branch (drop path).
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

/// A thread takes N consecutive elements at a time, a multiple of the four that share one call of the generator.
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

/// x + factor branch, where the sample decides on the factor.
template <class A>
struct AddPath {
  Mask<A> mask;
  RandomKey key;
  A* factors;
  struct OfElement {
    A factor;
    __device__ A operator()(A x, A branch) const { return x + factor * branch; }
  };
  __device__ OfElement operator()(int64_t sample) const {
    const A factor = mask(word_of(key, static_cast<uint64_t>(sample)), A(1));
    if (global_index() == 0) factors[sample] = factor;
    return {factor};
  }
};

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
           grid_for(n, 4 * (packed ? N : 4) * kMapThreads, kMapBlocks), kMapThreads, 0, n, mask_of<Acc<X>>(p), key, px, py);
  });
}

void add_drop_path(const Tensor& x, const Tensor& branch, double p, RandomKey key, const Tensor& y, const Tensor& factors) {
  check_add_drop_path(x, branch, p, y, factors);
  if (x.numel() == 0) return;
  dispatch(x.dtype(), branch.dtype(), [&](auto tx, auto tb) {
    using X = decltype(tx);
    const AddPath<Acc<X>> path{mask_of<Acc<X>>(p), key, factors.data<Acc<X>>()};
    map_rows("add_drop_path", path, x.dim(0), x.numel() / x.dim(0), y.data<X>(), x.data<X>(), branch.data<decltype(tb)>());
  });
}

}  // namespace mesa::kernels::cuda
