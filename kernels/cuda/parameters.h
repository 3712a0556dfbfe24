// What the CUDA kernels of optimizers share: one pass over a list of parameters, in chunks.
#pragma once
#include "chunks.h"
#include "mesa/kernels/optimizer_common.h"

namespace mesa::kernels::cuda {
namespace {

inline constexpr int kUpdateThreads = 256, kUpdatePack = 4;
inline constexpr int64_t kUpdateChunk =
    4096;  // elements for each block: about 120 KB of traffic, and thousands of blocks for a small model

/// A parameter, or a chunk of one. It does not change from step to step: what does is in the rule.
template <class T>
struct Part {
  T* w;
  const T* g;
  T *m, *v;    ///< or null
  bf16* copy;  ///< or null
  int64_t count;
  double weight_decay, lr_scale;
  int64_t parameter;  ///< its place in the list
  bool packed;        ///< every address allows packs

  bool operator==(const Part&) const = default;
  Part slice(int64_t begin, int64_t n) const {
    return {
        w + begin, g + begin, m ? m + begin : nullptr, v ? v + begin : nullptr, copy ? copy + begin : nullptr, n, weight_decay, lr_scale,
        parameter, packed};
  }
};

template <class T>
Part<T> part_of(const UpdateSlot& s, int64_t parameter) {
  const auto address = [](const Tensor& x) { return x.defined() ? x.data<T>() : nullptr; };
  Part<T> part{s.w.data<T>(), s.g.data<T>(),  address(s.m), address(s.v), s.copy.defined() ? s.copy.data<bf16>() : nullptr,
               s.w.numel(),   s.weight_decay, s.lr_scale,   parameter,    false};
  constexpr size_t kBytes = kUpdatePack * sizeof(T);
  part.packed = aligned(part.w, kBytes) && aligned(part.g, kBytes) && aligned(part.m, kBytes) && aligned(part.v, kBytes) &&
                aligned(part.copy, kUpdatePack * sizeof(bf16));
  return part;
}

/// f(parts) for the parameters of float and for those of double, if there are any: a model has one of them.
template <class F>
void for_each_dtype(const std::vector<UpdateSlot>& slots, const F& f) {
  std::vector<Part<float>> singles;
  std::vector<Part<double>> doubles;
  for (size_t i = 0; i < slots.size(); ++i)
    dispatch_wide(slots[i].w.dtype(), [&](auto tag) {
      if constexpr (std::is_same_v<decltype(tag), float>)
        singles.push_back(part_of<float>(slots[i], static_cast<int64_t>(i)));
      else
        doubles.push_back(part_of<double>(slots[i], static_cast<int64_t>(i)));
    });
  if (!singles.empty()) f(singles);
  if (!doubles.empty()) f(doubles);
}

/// f<N>(i) for runs of N elements from i on: this thread's share of the chunk.
template <class T, class F>
__device__ inline void for_each_run(const Part<T>& part, const F& f) {
  int64_t begin = 0;
  if (part.packed) {
    begin = part.count / kUpdatePack * kUpdatePack;
    for (int64_t i = static_cast<int64_t>(threadIdx.x) * kUpdatePack; i < begin; i += kUpdateThreads * kUpdatePack)
      f.template operator()<kUpdatePack>(i);
  }
  for (int64_t i = begin + threadIdx.x; i < part.count; i += kUpdateThreads) f.template operator()<1>(i);
}

}  // namespace
}  // namespace mesa::kernels::cuda
