// The formulas of the optimizers for one element, written once for host and device, and what kernels of every backend check.
// Everything stands in an anonymous namespace: the same names compiled for several instruction sets must not be merged by the linker.
#pragma once
#include <cmath>

#include "mesa/kernels/common.h"
#include "mesa/kernels/optimizer.h"

namespace mesa::kernels::MESA_ISA {
namespace {

// A rule is made on the host from the step's constants, combined in double and rounded once. `of` adds what differs among parameters;
// then it is called for each element with its value, gradient and moments.

#define MESA_RULE [[gnu::always_inline]] MESA_HD inline

/// Adam's moments, and m / (1-b1^t) / (sqrt(v) / sqrt(1-b2^t) + eps) but for the first factor.
template <class T>
struct AdamMoments {
  T beta1, rest1, beta2, rest2, root, eps, gradient_scale;

  template <class Step>
  explicit AdamMoments(const Step& s)
      : beta1(static_cast<T>(s.beta1)),
        rest1(static_cast<T>(1 - s.beta1)),
        beta2(static_cast<T>(s.beta2)),
        rest2(static_cast<T>(1 - s.beta2)),
        root(static_cast<T>(1 / std::sqrt(1 - std::pow(s.beta2, static_cast<double>(s.step))))),
        eps(static_cast<T>(s.eps)),
        gradient_scale(static_cast<T>(s.gradient_scale)) {}
  MESA_RULE void take_in(T g, T& m, T& v) const {
    const T gradient = g * gradient_scale;
    m = beta1 * m + rest1 * gradient;
    v = beta2 * v + rest2 * gradient * gradient;
  }
  MESA_RULE T denominator(T v) const { return std::sqrt(v) * root + eps; }
};

template <class Step>
double first_correction(const Step& s) {
  return 1 - std::pow(s.beta1, static_cast<double>(s.step));
}

template <class T>
struct AdamWRule {
  static constexpr int kMoments = 2;
  double lr, corrected_lr;
  AdamMoments<T> moments;
  T shrink{}, rate{};

  explicit AdamWRule(const AdamWStep& s) : lr(s.lr), corrected_lr(s.lr / first_correction(s)), moments(s) {}
  MESA_RULE AdamWRule of(double weight_decay, double lr_scale) const {
    AdamWRule rule = *this;
    rule.shrink = static_cast<T>(1 - lr * lr_scale * weight_decay);
    rule.rate = static_cast<T>(corrected_lr * lr_scale);
    return rule;
  }
  MESA_RULE void operator()(T& w, T g, T& m, T& v) const {
    moments.take_in(g, m, v);
    w = w * shrink - rate * m / moments.denominator(v);
  }
};

template <class T, bool kMomentum>
struct SgdRule {
  static constexpr int kMoments = kMomentum ? 1 : 0;
  double lr;
  T momentum, gradient_scale;
  bool nesterov;
  T decay{}, rate{};

  explicit SgdRule(const SgdStep& s)
      : lr(s.lr), momentum(static_cast<T>(s.momentum)), gradient_scale(static_cast<T>(s.gradient_scale)), nesterov(s.nesterov) {}
  MESA_RULE SgdRule of(double weight_decay, double lr_scale) const {
    SgdRule rule = *this;
    rule.decay = static_cast<T>(weight_decay);
    rule.rate = static_cast<T>(lr * lr_scale);
    return rule;
  }
  MESA_RULE void operator()(T& w, T g, T& m, T&) const {
    T d = g * gradient_scale + decay * w;
    if constexpr (kMomentum) {
      m = momentum * m + d;
      d = nesterov ? d + momentum * m : m;
    }
    w -= rate * d;
  }
};

/// LAMB's update u of an element. It is computed twice, for the norms and again to be applied: cheaper than keeping it.
template <class T>
struct LambRule {
  double lr;
  AdamMoments<T> moments;
  T first;
  T decay{};

  explicit LambRule(const LambStep& s) : lr(s.lr), moments(s), first(static_cast<T>(1 / first_correction(s))) {}
  MESA_RULE LambRule of(double weight_decay) const {
    LambRule rule = *this;
    rule.decay = static_cast<T>(weight_decay);
    return rule;
  }
  MESA_RULE T update(T w, T m, T v) const { return m * first / moments.denominator(v) + decay * w; }
};

/// |w| / |u| from the sums of squares; 1 where it is not defined.
MESA_RULE double trust_ratio(double w_squares, double u_squares, bool clip) {
  const double ratio = w_squares > 0 && u_squares > 0 ? std::sqrt(w_squares) / std::sqrt(u_squares) : 1.0;
  return clip && ratio > 1 ? 1.0 : ratio;
}

/// `w` is the average and `g` the value.
template <class T>
struct AverageRule {
  static constexpr int kMoments = 0;
  T weight, rest;
  bool near;  ///< to the average: torch.lerp takes the end that lies nearer

  explicit AverageRule(double decay) : weight(static_cast<T>(1 - decay)), rest(static_cast<T>(decay)), near(1 - decay < 0.5) {}
  MESA_RULE AverageRule of(double, double) const { return *this; }
  MESA_RULE void operator()(T& w, T g, T&, T&) const {
    const T step = g - w;
    w = near ? w + weight * step : g - rest * step;
  }
};

#undef MESA_RULE

/// The slots of an update, each with `moments` moments.
inline void check_slots(const std::vector<UpdateSlot>& slots, int moments, const char* kernel) {
  const auto alike = [&](const Tensor& w, const Tensor& x, const char* what) {
    check(x.defined() && x.numel() == w.numel() && x.is_contiguous() && w.is_contiguous(), kernel, ": ", what,
          " and the parameter must be contiguous and of one size");
  };
  for (const UpdateSlot& s : slots) {
    alike(s.w, s.g, "the gradient");
    if (moments > 0) alike(s.w, s.m, "the first moment");
    if (moments > 1) alike(s.w, s.v, "the second moment");
    if (s.copy.defined()) alike(s.w, s.copy, "the bf16 copy");
  }
}

inline void check_squares(const std::vector<UpdateSlot>& slots, const Tensor& squares) {
  check(squares.defined() && squares.dtype() == DType::f64 && squares.is_contiguous() &&
            squares.shape() == Shape({static_cast<int64_t>(slots.size()), 2}),
        "lamb: two sums of squares in f64 for each of ", slots.size(), " parameters");
}

inline void check_step(int64_t step, const char* kernel) { check(step >= 1, kernel, ": steps are counted from 1"); }

/// Averages as updates of them by the values.
inline std::vector<UpdateSlot> as_updates(const std::vector<AverageSlot>& slots) {
  std::vector<UpdateSlot> out;
  for (const AverageSlot& s : slots) {
    check_alike(s.average, s.value, "moving_average");
    out.push_back({s.average, s.value, {}, {}, {}, 0, 1});
  }
  return out;
}

}  // namespace
}  // namespace mesa::kernels::MESA_ISA
