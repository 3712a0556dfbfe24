// w <- w (1 - lr decay); m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; w <- w - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps).
#include "mesa/kernels/adamw.h"

#include <cmath>

#include "cpu.h"

namespace mesa::kernels::MESA_ISA {

namespace {

/// The step's constants, combined in double and rounded once.
template <class T>
struct Constants {
  T shrink, beta1, rest1, beta2, rest2, rate, root, eps, gradient_scale;
  Constants(const AdamWStep& s, double weight_decay)
      : shrink(static_cast<T>(1 - s.lr * weight_decay)), beta1(static_cast<T>(s.beta1)), rest1(static_cast<T>(1 - s.beta1)),
        beta2(static_cast<T>(s.beta2)), rest2(static_cast<T>(1 - s.beta2)),
        rate(static_cast<T>(s.lr / (1 - std::pow(s.beta1, static_cast<double>(s.step))))),
        root(static_cast<T>(1 / std::sqrt(1 - std::pow(s.beta2, static_cast<double>(s.step))))), eps(static_cast<T>(s.eps)),
        gradient_scale(static_cast<T>(s.gradient_scale)) {}
};

template <class T, bool kCopies>
void update(const Constants<T>& c, T* w, const T* g, T* m, T* v, bf16* copy, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const T gradient = g[i] * c.gradient_scale;
    const T m_new = c.beta1 * m[i] + c.rest1 * gradient;
    const T v_new = c.beta2 * v[i] + c.rest2 * gradient * gradient;
    const T w_new = w[i] * c.shrink - c.rate * m_new / (std::sqrt(v_new) * c.root + c.eps);
    m[i] = m_new;
    v[i] = v_new;
    w[i] = w_new;
    if constexpr (kCopies) store(copy + i, w_new);
  }
}

void update(const AdamWSlot& slot, const AdamWStep& step) {
  const Tensor &w = slot.w, &g = slot.g, &m = slot.m, &v = slot.v, &copy = slot.copy;
  check_alike(w, g, "adamw: gradient");
  check_alike(w, m, "adamw: first moment");
  check_alike(w, v, "adamw: second moment");
  bf16* narrow = nullptr;
  if (copy.defined()) {
    check_alike(w, copy, "adamw: bf16 copy");
    narrow = copy.data<bf16>();
  }
  dispatch_wide(w.dtype(), [&](auto tag) {
    using T = decltype(tag);
    T *pw = w.data<T>(), *pm = m.data<T>(), *pv = v.data<T>();
    const T* pg = g.data<T>();
    const Constants<T> constants(step, slot.weight_decay);
    parallel_elements(w.numel(), [=](int64_t begin, int64_t end) {
      if (narrow) update<T, true>(constants, pw, pg, pm, pv, narrow, begin, end);
      else update<T, false>(constants, pw, pg, pm, pv, narrow, begin, end);
    });
  });
}

}  // namespace

void adamw(const std::vector<AdamWSlot>& slots, AdamWStep step) {
  check(step.step >= 1, "adamw: steps are counted from 1");
  for (const AdamWSlot& slot : slots) update(slot, step);
}

}  // namespace mesa::kernels::MESA_ISA
