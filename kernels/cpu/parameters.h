// What the CPU kernels of optimizers share: one pass over each parameter.
#pragma once
#include "cpu.h"
#include "mesa/kernels/optimizer_common.h"

namespace mesa::kernels::MESA_ISA {
namespace {

/// A parameter's memory.
template <class T>
struct Span {
  T* w;
  const T* g;
  T *m, *v;
  bf16* copy;

  explicit Span(const UpdateSlot& s)
      : w(s.w.data<T>()),
        g(s.g.data<T>()),
        m(s.m.defined() ? s.m.data<T>() : nullptr),
        v(s.v.defined() ? s.v.data<T>() : nullptr),
        copy(s.copy.defined() ? s.copy.data<bf16>() : nullptr) {}
};

template <bool kCopies, class T, class Rule>
void update(const Rule rule, const Span<T> p, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    T w = p.w[i], m{}, v{};
    if constexpr (Rule::kMoments > 0) m = p.m[i];
    if constexpr (Rule::kMoments > 1) v = p.v[i];
    rule(w, p.g[i], m, v);
    if constexpr (Rule::kMoments > 0) p.m[i] = m;
    if constexpr (Rule::kMoments > 1) p.v[i] = v;
    p.w[i] = w;
    if constexpr (kCopies) store(p.copy + i, w);
  }
}

/// Applies the rule that `make(tag)` returns for float or double to every element of every slot.
template <class Make>
void update_all(const std::vector<UpdateSlot>& slots, const Make& make) {
  for (const UpdateSlot& slot : slots)
    dispatch_wide(slot.w.dtype(), [&](auto tag) {
      const auto rule = make(tag).of(slot.weight_decay, slot.lr_scale);
      const Span<decltype(tag)> span(slot);
      parallel_elements(slot.w.numel(), [=](int64_t begin, int64_t end) {
        if (span.copy)
          update<true>(rule, span, begin, end);
        else
          update<false>(rule, span, begin, end);
      });
    });
}

}  // namespace
}  // namespace mesa::kernels::MESA_ISA
