// m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; u = m / (1 - b1^t) / (sqrt(v) / sqrt(1 - b2^t) + eps) + decay w;
// w <- w - lr |w| / |u| u. Norms are summed in chunks of fixed size and the chunks' sums added in order.
#include "parameters.h"

namespace mesa::kernels::MESA_ISA {

namespace {

constexpr int64_t kNormElements = 8192;

struct Squares {
  double w = 0, u = 0;
};

/// New moments, and the squares of values and updates with them.
template <class T>
Squares take_in(const LambRule<T> rule, const Span<T> p, int64_t begin, int64_t end) {
  double w_sum = 0, u_sum = 0;
#pragma omp simd reduction(+ : w_sum, u_sum)
  for (int64_t i = begin; i < end; ++i) {
    T m = p.m[i], v = p.v[i];
    rule.moments.take_in(p.g[i], m, v);
    p.m[i] = m;
    p.v[i] = v;
    const double w = p.w[i], u = rule.update(p.w[i], m, v);
    w_sum += w * w;
    u_sum += u * u;
  }
  return {w_sum, u_sum};
}

template <bool kCopies, class T>
void apply(const LambRule<T> rule, const T rate, const Span<T> p, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const T w = p.w[i] - rate * rule.update(p.w[i], p.m[i], p.v[i]);
    p.w[i] = w;
    if constexpr (kCopies) store(p.copy + i, w);
  }
}

template <class T>
Squares take_in_all(const LambRule<T> rule, const UpdateSlot& slot) {
  const Span<T> span(slot);
  const int64_t n = slot.w.numel();
  std::vector<Squares> partial(static_cast<size_t>((n + kNormElements - 1) / kNormElements));
  Squares* sums = partial.data();
  parallel_chunks(n, kNormElements, 1, [=](int64_t c, int64_t begin, int64_t end) { sums[c] = take_in(rule, span, begin, end); });
  Squares all;
  for (const Squares& part : partial) all.w += part.w, all.u += part.u;
  return all;
}

template <class T>
void apply_all(const LambRule<T> rule, const UpdateSlot& slot, double ratio) {
  const Span<T> span(slot);
  const T rate = static_cast<T>(rule.lr * slot.lr_scale * ratio);
  parallel_elements(slot.w.numel(), [=](int64_t begin, int64_t end) {
    if (span.copy)
      apply<true>(rule, rate, span, begin, end);
    else
      apply<false>(rule, rate, span, begin, end);
  });
}

}  // namespace

namespace {

/// f(rule, slot, its squares) for each slot.
template <class F>
void each_slot(const std::vector<UpdateSlot>& slots, const LambStep& step, const Tensor& squares, const F& f) {
  check_step(step.step, "lamb");
  check_slots(slots, 2, "lamb");
  check_squares(slots, squares);
  auto* sums = reinterpret_cast<Squares*>(squares.data<double>());
  for (size_t i = 0; i < slots.size(); ++i)
    dispatch_wide(slots[i].w.dtype(), [&](auto tag) { f(LambRule<decltype(tag)>(step).of(slots[i].weight_decay), slots[i], sums[i]); });
}

}  // namespace

void lamb_moments(const std::vector<UpdateSlot>& slots, LambStep step, const Tensor& squares) {
  each_slot(slots, step, squares, [](const auto& rule, const UpdateSlot& slot, Squares& sum) { sum = take_in_all(rule, slot); });
}

void lamb(const std::vector<UpdateSlot>& slots, LambStep step, const Tensor& squares) {
  each_slot(slots, step, squares, [&](const auto& rule, const UpdateSlot& slot, const Squares& sum) {
    apply_all(rule, slot, slot.weight_decay != 0 ? trust_ratio(sum.w, sum.u, step.trust_clip) : 1.0);
  });
}

}  // namespace mesa::kernels::MESA_ISA
