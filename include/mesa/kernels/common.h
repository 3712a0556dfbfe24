// What kernels of every backend share on the host: dispatch over dtypes, and the contracts of their arguments.
// Everything stands in an anonymous namespace: the same names compiled for several instruction sets must not be merged by the linker.
#pragma once
#include <cstdint>
#include <type_traits>

#include "mesa/base/random.h"
#include "mesa/kernels/norm.h"
#include "mesa/tensor/mixing.h"
#include "mesa/tensor/tensor.h"

namespace mesa::kernels::MESA_ISA {
namespace {

/// The type that sums and formulas run in: float for f32 and bf16, double for f64.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// --- dispatch -------------------------------------------------------------------------------------------------------------------

/// f(tag) with float or bf16.
template <class F>
void dispatch_narrow(DType dtype, F&& f) {
  if (dtype == DType::f32)
    f(float{});
  else if (dtype == DType::bf16)
    f(bf16{});
  else
    fail("tensors of ", to_string(dtype), " do not mix with f32 or bf16 here");
}
/// f(tag) with float or double.
template <class F>
void dispatch_wide(DType dtype, F&& f) {
  if (dtype == DType::f32)
    f(float{});
  else if (dtype == DType::f64)
    f(double{});
  else
    fail("a tensor of ", to_string(dtype), " where f32 or f64 is needed");
}
/// f(a, b): both f64, or any mix of f32 and bf16.
template <class F>
void dispatch(DType a, DType b, F&& f) {
  if (a == DType::f64 && b == DType::f64) return f(double{}, double{});
  dispatch_narrow(a, [&](auto ta) { dispatch_narrow(b, [&](auto tb) { f(ta, tb); }); });
}
template <class F>
void dispatch(DType a, DType b, DType c, F&& f) {
  if (a == DType::f64 && b == DType::f64 && c == DType::f64) return f(double{}, double{}, double{});
  dispatch_narrow(a, [&](auto ta) { dispatch_narrow(b, [&](auto tb) { dispatch_narrow(c, [&](auto tc) { f(ta, tb, tc); }); }); });
}

// --- contracts ------------------------------------------------------------------------------------------------------------------

inline void check_flat(const Tensor& x, const char* what) { check(x.defined() && x.is_contiguous(), what, " must be a contiguous tensor"); }
inline void check_alike(const Tensor& x, const Tensor& y, const char* what) {
  check(x.numel() == y.numel(), what, ": tensors of shapes ", x.shape(), " and ", y.shape());
  check(x.is_contiguous() && y.is_contiguous(), what, " needs contiguous tensors");
}

inline void check_add_drop_path(const Tensor& x, const Tensor& branch, double p, const Tensor& y, const Tensor& factors) {
  check(x.rank() >= 1, "add_drop_path needs an axis of samples");
  check(p >= 0 && p <= 1, "add_drop_path: the probability ", p, " is not in [0, 1]");
  check_alike(x, branch, "add_drop_path: branch");
  check_alike(x, y, "add_drop_path: y");
  check(x.dtype() == y.dtype(), "add_drop_path adds to ", to_string(x.dtype()), " in ", to_string(y.dtype()));
  check(factors.is_contiguous() && factors.numel() == x.dim(0), "add_drop_path: ", factors.numel(), " factors for ", x.dim(0), " samples");
  const DType wide = x.dtype() == DType::f64 ? DType::f64 : DType::f32;
  check(factors.dtype() == wide, "add_drop_path: factors in ", to_string(factors.dtype()), ", not in ", to_string(wide));
}

/// One bit for each element of x.
inline void check_mask(const Tensor& mask, const Tensor& x) {
  check(mask.dtype() == DType::u8 && mask.is_contiguous() && mask.numel() == (x.numel() + 7) / 8, "a mask of ", mask.numel(), " bytes for ",
        x.numel(), " elements");
}

/// A parameter for each element of rows of `width`.
inline void check_parameter(const Tensor& p, int64_t width, const char* name) {
  check(p.is_contiguous() && p.numel() == width, name, " has ", p.numel(), " elements but x ends in ", width);
}

/// Rows of `width` elements at a constant distance.
template <class T>
struct Rows {
  T* base;
  int64_t stride;
  T* operator[](int64_t row) const { return base + row * stride; }
};
template <class T>
Rows<T> rows_of(const Tensor& x) {
  check(x.has_uniform_rows(), "a tensor of shape ", x.shape(), " must consist of uniform rows");
  return {x.data<T>(), x.row_stride()};
}
inline int64_t width_of(const Tensor& x) { return x.rank() == 0 ? 1 : x.dim(-1); }

/// Kernels that draw four words at once begin at a multiple of four.
inline void check_first(const RandomKey& key) {
  check(key.first % 4 == 0, "the numbers of a part begin at ", key.first, ", no multiple of 4");
}

/// Rows of Mixing for a batch whose samples pair up; may be undefined.
inline void check_mixing(const Tensor& mixing, const Tensor& samples) {
  if (!mixing.defined()) return;
  const int64_t batch = samples.dim(0);
  check(mixing.is_contiguous() && mixing.dtype() == DType::f32 && mixing.shape() == Shape({batch, Mixing::kNumbers}), "the mixing of ",
        batch, " samples is ", mixing.shape());
  check(batch % 2 == 0, "samples are mixed in pairs; ", batch, " is odd");
}

/// One number for each sample, or null where none is mirrored.
inline const uint8_t* mirror_flags(const Tensor& mirrored, const Tensor& samples) {
  if (!mirrored.defined()) return nullptr;
  check(mirrored.is_contiguous() && mirrored.dtype() == DType::u8 && mirrored.shape() == Shape({samples.dim(0)}), "flags of shape ",
        mirrored.shape(), " for ", samples.dim(0), " samples that may be mirrored");
  return mirrored.data<uint8_t>();
}

inline void check_logits(const Tensor& logits, const char* name) {
  check(logits.rank() == 2 && logits.dim(1) > 0, name, ": logits must be [B, K], not ", logits.shape());
}
inline void check_labels(const Tensor& labels, int64_t batch) {
  check(labels.is_contiguous() && labels.dtype() == DType::i64 && labels.numel() == batch, labels.numel(), " labels for ", batch,
        " rows of logits");
}
inline void check_loss(const Tensor& logits, const Tensor& targets, const Tensor& loss, const char* name) {
  check_logits(logits, name);
  check(targets.shape() == logits.shape(), name, ": targets of shape ", targets.shape(), " for logits ", logits.shape());
  check(loss.is_contiguous() && loss.numel() == logits.dim(0), name, ": loss has ", loss.numel(), " elements");
}
inline void check_loss_grad(const Tensor& logits, const Tensor& targets, const Tensor& dlogits, const char* name) {
  check_logits(logits, name);
  check(targets.shape() == logits.shape() && dlogits.shape() == logits.shape(), name, ": tensors of shapes ", logits.shape(), ", ",
        targets.shape(), " and ", dlogits.shape());
}
inline void check_targets(const Tensor& labels, const Tensor& mixing, const Tensor& targets) {
  check_logits(targets, "mixed_targets");
  check_flat(targets, "mixed_targets: targets");
  check_labels(labels, targets.dim(0));
  check_mixing(mixing, targets);
}
inline void check_argmax(const Tensor& x, const Tensor& labels) {
  check_logits(x, "argmax");
  check_labels(labels, x.dim(0));
}

/// What layer_norm takes; xhat and rstd may be undefined.
inline void check_layer_norm(const Tensor& x, const Tensor& gamma, const Tensor& beta, const Tensor& y, const Tensor& xhat,
                             const Tensor& rstd) {
  check(x.shape() == y.shape(), "layer_norm: tensors of shapes ", x.shape(), " and ", y.shape());
  check_parameter(gamma, width_of(x), "gamma");
  check_parameter(beta, width_of(x), "beta");
  if (xhat.defined()) check_alike(xhat, y, "layer_norm: xhat");
  if (rstd.defined()) check(rstd.is_contiguous() && rstd.numel() == x.rows(), "layer_norm: rstd has ", rstd.numel(), " elements");
}
/// What layer_norm_grad takes beside xhat, which has the dtype `kept`.
inline void check_layer_norm_grad(const Tensor& dy, const Tensor& rstd, const Tensor& gamma, const Tensor& beta, const LayerNormGrads& to,
                                  DType kept) {
  const int64_t width = width_of(dy), rows = dy.rows();
  check_alike(dy, to.dx, "layer_norm_grad: dx");
  check_parameter(gamma, width, "gamma");
  check(rstd.is_contiguous() && rstd.numel() == rows, "layer_norm_grad: rstd has ", rstd.numel(), " elements for ", rows, " rows");
  if (to.dgamma.defined()) check_parameter(to.dgamma, width, "dgamma");
  if (to.dbeta.defined()) check_parameter(to.dbeta, width, "dbeta");
  if (to.dx_copy.defined()) {
    check_alike(dy, to.dx_copy, "layer_norm_grad: a copy of dx");
    check(to.dx_copy.dtype() == DType::bf16, "layer_norm_grad copies dx in bf16, not in ", to_string(to.dx_copy.dtype()));
  }
  if (const Tensor& sums = to.dx_sums; sums.defined()) {
    const Shape shape{layer_norm_grad_parts(rows, width), width};
    check(sums.is_contiguous() && sums.shape() == shape && sums.dtype() == gamma.dtype(), "layer_norm_grad: sums of dx in ", sums.shape(),
          " ", to_string(sums.dtype()), ", not ", shape, " ", to_string(gamma.dtype()));
  }
  if (const Tensor& factors = to.copy_factors; factors.defined()) {
    check(factors.is_contiguous() && factors.dtype() == gamma.dtype(), "layer_norm_grad: factors of the copy in ",
          to_string(factors.dtype()), " beside a gamma in ", to_string(gamma.dtype()));
    check(factors.numel() > 0 && rows % factors.numel() == 0, "layer_norm_grad: ", factors.numel(), " factors for ", rows, " rows");
    check(rows < int64_t{1} << 31, "layer_norm_grad: factors for ", rows, " rows are too many");  // which a GPU divides in 32 bits
  }
  if (!to.y.defined()) return;
  check_alike(dy, to.y, "layer_norm_grad: y");
  check_parameter(beta, width, "beta");
  check(to.y.dtype() == kept, "layer_norm_grad rebuilds y in ", to_string(kept), ", not in ", to_string(to.y.dtype()));
}

}  // namespace
}  // namespace mesa::kernels::MESA_ISA
