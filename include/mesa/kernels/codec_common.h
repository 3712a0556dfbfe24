// What the codec kernels of every backend check on the host. Internal linkage, for the reason given in common.h.
#pragma once
#include "mesa/kernels/codec.h"

namespace mesa::kernels::MESA_ISA {
namespace {

inline void check_layout(const Tensor& x, const GroupLayout& layout) {
  const int64_t n = x.numel(), whole = layout.outer * layout.groups * layout.inner;
  const bool fits = layout.consecutive ? layout.outer == 1 && whole >= n && whole - layout.inner < n : whole == n;
  check(n == 0 || (layout.inner > 0 && fits), "groups [", layout.outer, ", ", layout.groups, ", ", layout.inner, "] do not cover ",
        x.shape());
  check(is_floating(x.dtype()), "the codec takes floating tensors, not ", to_string(x.dtype()));
  check(x.has_uniform_rows(), "the codec needs rows at one distance, not the strides ", x.strides(), " of ", x.shape());
}

/// A defined tensor that holds one float for each group.
inline float* per_group(const Tensor& t, const GroupLayout& layout) {
  check(t.is_contiguous() && t.numel() >= layout.groups, layout.groups, " groups need as many numbers, not ", t.shape());
  return t.data<float>();
}

inline uint8_t* code_bytes(const Tensor& codes, int64_t n, int bits) {
  check(bits == 8 || bits == 4 || bits == 2, "codes have 8, 4 or 2 bits, not ", bits);
  check(codes.is_contiguous() && codes.numel() == (n * bits + 7) / 8, n, " codes of ", bits, " bits do not fill ", codes.shape());
  return codes.data<uint8_t>();
}

/// The two counters of odd elements, or null where they are not wanted.
inline int64_t* count_pair(const Tensor& counts) {
  if (!counts.defined()) return nullptr;
  check(counts.numel() == 2 && counts.is_contiguous(), "counts of odd elements of shape ", counts.shape(), "; there are two");
  return counts.data<int64_t>();
}

}  // namespace
}  // namespace mesa::kernels::MESA_ISA
