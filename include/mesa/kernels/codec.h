// Affine quantization to 8, 4 or 2 bits, really packed: q = clamp(floor((x - offset) / step + u), 0, 2^bits - 1).
#pragma once
#include "mesa/base/random.h"
#include "mesa/kernels/kernel.h"

namespace mesa::kernels {

/// How a tensor's elements fall into groups that share (step, offset). x is read in logical order as [outer, groups, inner].
struct GroupLayout {
  int64_t outer = 1, groups = 1, inner = 1;
  bool consecutive = false;  ///< groups are runs of `inner` consecutive elements (outer 1); the last may be short
};

// `counts` [2] i64, where the tensor lives (undefined: not wanted), is added to: [0] saturated elements, that is finite ones outside the
// range: x - offset < -step/1000 or > (2^bits - 1 + 1/1000) step, in f32; [1] NaN or infinite ones.

/// lo[g], hi[g] (f32) <- minimum and maximum of each group over finite elements (0, 0 if there is none). x uniform rows, f32|bf16|f64.
MESA_KERNEL(group_range, const Tensor& x, GroupLayout layout, const Tensor& lo, const Tensor& hi, const Tensor& counts);

/// Packs x (uniform rows) into codes [ceil(numel bits / 8)] u8 with given step[g] > 0 or = 0 (a constant group: code 0), offset[g] (f32).
/// Element e (logical order) lies in bits (e mod (8/bits)) * bits of byte e / (8/bits), low bits first.
/// u is 1/2 for nearest; for stochastic rounding the 16-bit dither h(e) + 1/2 over 65,536, where h(e) is the low (e even) or high (e odd)
/// half of word (e % 8) / 2 of philox(e / 8, key.now(), key.key).
/// v = fma(x - offset, 1/step, u) in f32 with 1/step rounded once: the same on every device. NaN gets code 0, infinities an end; both are
/// counted. f64 is rounded to f32 first. A group whose 1/step is not finite counts as constant.
/// lo/hi, if defined, receive the groups' minimum and maximum as group_range gives them, in the same pass.
MESA_KERNEL(quantize, const Tensor& x, GroupLayout layout, int bits, bool stochastic, RandomKey key, const Tensor& step,
            const Tensor& offset, const Tensor& codes, const Tensor& lo, const Tensor& hi, const Tensor& counts);
/// The range of each group and its codes (one visit if the groups are consecutive and short, otherwise two passes): offset = min,
/// step = (max - min) / (2^bits - 1), or 0 where that is too small to divide by; both are written. Nothing finite saturates.
MESA_KERNEL(quantize_current, const Tensor& x, GroupLayout layout, int bits, bool stochastic, RandomKey key, const Tensor& step,
            const Tensor& offset, const Tensor& codes, const Tensor& counts);
/// y <- fma(code, step[g], offset[g]), contiguous, f32|bf16|f64.
MESA_KERNEL(dequantize, const Tensor& codes, GroupLayout layout, int bits, const Tensor& step, const Tensor& offset, const Tensor& y);

/// How a tensor is to be coded, and where its codes go. All of it is known before the tensor is, so that the kernel which produces or reads
/// it can write its codes in the same pass. By each group's own range, as quantize_current has it; or by running estimates of the ranges
/// (Pan et al. 2021): with r = hi - lo and m = lo of the tensor just seen, the estimates become decay alpha + (1 - decay) r and decay beta
/// + (1 - decay) m; where alpha is 0 (a group that was constant so far) r and m themselves.
struct Coding {
  GroupLayout layout;
  int bits = 8;
  bool stochastic = true;
  RandomKey key;
  Tensor step, offset, codes;  ///< receive the groups' scales and the codes, all as quantize has them
  Tensor counts;               ///< as quantize has it

  // By running estimates only, which make step[g] = alpha[g] / (2^bits - 1) and offset[g] = beta[g]:
  Tensor alpha, beta;            ///< [groups] f32: the estimates so far
  Tensor next_alpha, next_beta;  ///< receive the new ones; may be the same tensors
  double decay = 0.9;

  bool defined() const { return codes.defined(); }
  bool is_running() const { return alpha.defined(); }
};
/// Packs x by running estimates and takes its range into them, in one pass.
MESA_KERNEL(quantize_running, const Tensor& x, const Coding& into);
/// Packs x as `into` says.
inline void encode(const Tensor& x, const Coding& into) {
  if (into.is_running()) return quantize_running(x, into);
  quantize_current(x, into.layout, into.bits, into.stochastic, into.key, into.step, into.offset, into.codes, into.counts);
}
/// The estimates' beginning: alpha <- hi - lo, beta <- lo, all [groups] f32.
MESA_KERNEL(calibrate_range, const Tensor& lo, const Tensor& hi, const Tensor& alpha, const Tensor& beta);

/// Codes with everything that decodes them, as the attention kernels read them in place of the values.
struct Coded {
  Tensor codes, step, offset;
  GroupLayout layout;
  int bits = 8;
};
inline const Tensor& leading_tensor(const Coded& x) { return x.codes; }
/// The values themselves, contiguous, of `like`'s shape and dtype.
inline Tensor decoded(const Coded& x, const Tensor& like) {
  const Tensor values = empty_like(like);
  dequantize(x.codes, x.layout, x.bits, x.step, x.offset, values);
  return values;
}

}  // namespace mesa::kernels
