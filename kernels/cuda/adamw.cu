// w <- w (1 - lr decay); m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; w <- w - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps).
#include <cmath>

#include "chunks.h"
#include "cuda.h"
#include "mesa/kernels/adamw.h"

namespace mesa::kernels::cuda {

namespace {

constexpr int kThreads = 256, kPack = 4;
constexpr int64_t kChunk = 4096;  // elements for each block: about 120 KB of traffic, and thousands of blocks for a small model

/// The step's constants, combined in double and rounded once; the decay differs among parameters.
template <class T>
struct Constants {
  double lr;
  T beta1, rest1, beta2, rest2, rate, root, eps, gradient_scale;
  explicit Constants(const AdamWStep& s)
      : lr(s.lr),
        beta1(static_cast<T>(s.beta1)),
        rest1(static_cast<T>(1 - s.beta1)),
        beta2(static_cast<T>(s.beta2)),
        rest2(static_cast<T>(1 - s.beta2)),
        rate(static_cast<T>(s.lr / (1 - std::pow(s.beta1, static_cast<double>(s.step))))),
        root(static_cast<T>(1 / std::sqrt(1 - std::pow(s.beta2, static_cast<double>(s.step))))),
        eps(static_cast<T>(s.eps)),
        gradient_scale(static_cast<T>(s.gradient_scale)) {}
};

/// A parameter, or a chunk of one. It does not change from step to step: what does is in Constants.
template <class T>
struct Part {
  T* w;
  const T* g;
  T *m, *v;
  bf16* copy;  ///< or null
  int64_t count;
  double weight_decay;
  bool packed;  ///< every address allows packs

  bool operator==(const Part&) const = default;
  Part slice(int64_t begin, int64_t n) const {
    return {w + begin, g + begin, m + begin, v + begin, copy ? copy + begin : nullptr, n, weight_decay, packed};
  }
};

/// N elements from i on.
template <int N, class T>
__device__ inline void update(const Constants<T>& c, T shrink, const Part<T>& part, int64_t i) {
  T w[N], g[N], m[N], v[N];
  load_pack(part.w + i, w);
  load_pack(part.g + i, g);
  load_pack(part.m + i, m);
  load_pack(part.v + i, v);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const T gradient = g[k] * c.gradient_scale;
    m[k] = c.beta1 * m[k] + c.rest1 * gradient;
    v[k] = c.beta2 * v[k] + c.rest2 * gradient * gradient;
    w[k] = w[k] * shrink - c.rate * m[k] / (std::sqrt(v[k]) * c.root + c.eps);
  }
  store_pack(part.m + i, m);
  store_pack(part.v + i, v);
  store_pack(part.w + i, w);
  if (part.copy) store_pack(part.copy + i, w);
}

template <class T>
__global__ void adamw_kernel(const Part<T>* parts, Constants<T> c) {
  const Part<T> part = parts[blockIdx.x];
  const T shrink = static_cast<T>(1 - c.lr * part.weight_decay);
  int64_t begin = 0;
  if (part.packed) {
    begin = part.count / kPack * kPack;
    for (int64_t i = static_cast<int64_t>(threadIdx.x) * kPack; i < begin; i += kThreads * kPack) update<kPack>(c, shrink, part, i);
  }
  for (int64_t i = begin + threadIdx.x; i < part.count; i += kThreads) update<1>(c, shrink, part, i);
}

void check_slot(const AdamWSlot& s) {
  check_alike(s.w, s.g, "adamw: gradient");
  check_alike(s.w, s.m, "adamw: first moment");
  check_alike(s.w, s.v, "adamw: second moment");
  if (s.copy.defined()) check_alike(s.w, s.copy, "adamw: bf16 copy");
}

template <class T>
Part<T> part_of(const AdamWSlot& s) {
  Part<T> part{s.w.data<T>(), s.g.data<T>(),  s.m.data<T>(), s.v.data<T>(), s.copy.defined() ? s.copy.data<bf16>() : nullptr,
               s.w.numel(),   s.weight_decay, false};
  constexpr size_t kBytes = kPack * sizeof(T);
  part.packed = aligned(part.w, kBytes) && aligned(part.g, kBytes) && aligned(part.m, kBytes) && aligned(part.v, kBytes) &&
                aligned(part.copy, kPack * sizeof(bf16));
  return part;
}

}  // namespace

void adamw(const std::vector<AdamWSlot>& slots, AdamWStep step) {
  check(step.step >= 1, "adamw: steps are counted from 1");
  std::vector<Part<float>> singles;
  std::vector<Part<double>> doubles;
  for (const AdamWSlot& slot : slots) {
    check_slot(slot);
    dispatch_wide(slot.w.dtype(), [&](auto tag) {
      if constexpr (std::is_same_v<decltype(tag), float>)
        singles.push_back(part_of<float>(slot));
      else
        doubles.push_back(part_of<double>(slot));
    });
  }
  const auto update_all = [&]<class T>(const std::vector<Part<T>>& parts) {  // one kernel for each dtype, and a model has one
    if (parts.empty()) return;
    const ChunkTable<Part<T>> table = chunk_table(parts, kChunk, slots.front().w.device());
    if (table.count > 0)
      launch("adamw", &adamw_kernel<T>, static_cast<unsigned>(table.count), kThreads, 0, table.chunks, Constants<T>(step));
  };
  update_all(singles);
  update_all(doubles);
}

}  // namespace mesa::kernels::cuda
