// keep / (1 - p), keep = uniform >= p, times each element of x (dropout) or each sample of a branch (drop path).
#include "cpu.h"
#include "mesa/kernels/elementwise.h"

namespace mesa::kernels::MESA_ISA {

void dropout(const Tensor& x, const Tensor& y, double p, RandomKey key) {
  check_alike(x, y, "dropout");
  check(p >= 0 && p <= 1, "dropout: the probability ", p, " is not in [0, 1]");
  check_first(key);
  const uint32_t threshold = scalar::dropout_threshold(p);
  dispatch(x.dtype(), y.dtype(), [&](auto tx, auto ty) {
    using A = Acc<decltype(tx)>;
    const auto* px = x.data<decltype(tx)>();
    auto* py = y.data<decltype(ty)>();
    const A factor = p < 1 ? static_cast<A>(1 / (1 - p)) : A(0);
    parallel_elements(y.numel(), [=](int64_t begin, int64_t end) {  // begin is a multiple of 64, so it begins a block of words
      uint32_t words[kRandomBlock];
      for (int64_t at = begin; at < end; at += kRandomBlock) {
        random_block(key, (static_cast<uint64_t>(at) + key.first) / 4, words);
        const int64_t count = std::min<int64_t>(kRandomBlock, end - at);
        const auto* qx = px + at;
        auto* qy = py + at;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) store(qy + i, scalar::keeps(words[i], threshold) ? factor * load(qx + i) : A(0));
      }
    });
  });
}

void add_drop_path(const Tensor& x, const Tensor& branch, double p, RandomKey key, const Tensor& y, const Tensor& factors) {
  check_add_drop_path(x, branch, p, y, factors);
  if (x.numel() == 0) return;
  const uint32_t threshold = scalar::dropout_threshold(p);
  const int64_t sample = x.numel() / x.dim(0);
  dispatch(x.dtype(), branch.dtype(), [&](auto tx, auto tb) {
    using A = Acc<decltype(tx)>;
    const auto* px = x.data<decltype(tx)>();
    const auto* pb = branch.data<decltype(tb)>();
    auto* py = y.data<decltype(tx)>();
    A* pf = factors.data<A>();
    parallel_within_rows(x.dim(0), sample, [=](int64_t b, int64_t begin, int64_t end) {
      const bool keep = scalar::keeps(random_word(key, static_cast<uint64_t>(b)), threshold);
      const A factor = keep ? static_cast<A>(1 / (1 - p)) : A(0);
      if (begin == b * sample) pf[b] = factor;
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) store(py + i, load(px + i) + factor * load(pb + i));
    });
  });
}

}  // namespace mesa::kernels::MESA_ISA
