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

/// y = x + factor branch.
template <class A>
struct AddScaled {
  A factor;
  __device__ A operator()(A x, A branch) const { return x + factor * branch; }
};

/// blockIdx.y goes over the samples, each of which is a whole number of packs.
template <int N, class X, class B>
__global__ void add_drop_path_kernel(int64_t samples, int64_t packs, Mask<Acc<X>> mask, RandomKey key, const X* x, const B* branch, X* y,
                                     Acc<X>* factors) {
  const int64_t stride = global_stride();
  for (int64_t b = blockIdx.y; b < samples; b += gridDim.y) {
    const AddScaled<Acc<X>> add{mask(word_of(key, static_cast<uint64_t>(b)), Acc<X>(1))};
    if (global_index() == 0) factors[b] = add.factor;
    const int64_t end = (b + 1) * packs;
    int64_t i = b * packs + global_index();
    for (; i + stride < end; i += 2 * stride) {  // the loads of both packs are under way before the first store
      const int64_t j = i + stride;
      const auto low = apply<N>(add, elements_at<N>(x + i * N), elements_at<N>(branch + i * N));
      const auto high = apply<N>(add, elements_at<N>(x + j * N), elements_at<N>(branch + j * N));
      store_pack(y + i * N, low.v);
      store_pack(y + j * N, high.v);
    }
    if (i < end) store_pack(y + i * N, apply<N>(add, elements_at<N>(x + i * N), elements_at<N>(branch + i * N)).v);
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

void add_drop_path(const Tensor& x, const Tensor& branch, double p, RandomKey key, const Tensor& y, const Tensor& factors) {
  check_drop_path(x, branch, p, y, factors);
  if (x.numel() == 0) return;
  const int64_t samples = x.dim(0), sample = x.numel() / samples;
  dispatch(x.dtype(), branch.dtype(), [&](auto tx, auto tb) {
    using X = decltype(tx);
    using B = decltype(tb);
    constexpr int N = kLaneElements<X, B>;
    const X* px = x.data<X>();
    const B* pb = branch.data<B>();
    X* py = y.data<X>();
    const bool packed = sample % N == 0 && aligned(px, N * sizeof(X)) && aligned(pb, N * sizeof(B)) && aligned(py, N * sizeof(X));
    const int64_t packs = sample / (packed ? N : 1);
    const dim3 grid(grid_for(packs, 4 * kMapThreads, kMapBlocks), static_cast<unsigned>(std::min<int64_t>(samples, 65535)));
    launch("add_drop_path", packed ? &add_drop_path_kernel<N, X, B> : &add_drop_path_kernel<1, X, B>, grid, kMapThreads, 0, samples, packs,
           mask_of<Acc<X>>(p), key, px, pb, py, factors.data<Acc<X>>());
  });
}

}  // namespace mesa::kernels::cuda
