#include "mesa/kernels/attention.h"

#include <algorithm>

#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/matmul.h"
#include "mesa/kernels/norm.h"

namespace mesa::kernels {
namespace {

/// Images per turn: the scores of a turn (f32, [images, H, N, N]) should stay in the cores' second-level caches.
constexpr int64_t kScoreBytes = 1 << 21;

int64_t images_per_turn(const Tensor& q) {
  const int64_t one = q.dim(1) * q.dim(2) * q.dim(2) * 4;
  return std::clamp<int64_t>(kScoreBytes / std::max<int64_t>(one, 1), 1, std::max<int64_t>(q.dim(0), 1));
}

DType score_type(const Tensor& q) { return q.dtype() == DType::f64 ? DType::f64 : DType::f32; }

Tensor head(const Tensor& t, int64_t images) { return t.dim(0) == images ? t : t.narrow(0, 0, images); }

/// Calls turn(from, count) over the images.
template <class Turn>
void by_turns(const Tensor& q, const Turn& turn) {
  const int64_t step = images_per_turn(q);
  for (int64_t from = 0; from < q.dim(0); from += step) turn(from, std::min(step, q.dim(0) - from));
}

Tensor score_buffer(const Tensor& q, DType dtype) {
  return Tensor::empty({images_per_turn(q), q.dim(1), q.dim(2), q.dim(2)}, dtype, q.device());
}

/// [B, N, C] -> [B, H, N, C/H], a view.
Tensor by_head(const Tensor& x, int64_t heads) { return x.split_last(x.dim(-1) / heads).transpose(1, 2); }

bool has_fused_kernel(const Tensor& o, int64_t heads) {
  const int64_t head = o.dim(2) / heads;
  return is_gpu(o.device()) && fused_attention.cuda != nullptr && o.dtype() == DType::bf16 && (head == 32 || head == 64) &&
         o.dim(1) <= 1024;
}

Tensor decode(const AttentionOperand& x, const Tensor& like) {
  if (x.values.defined()) return x.values;
  const Tensor values = Tensor::empty(like.shape(), like.dtype(), like.device());
  dequantize(x.coded.codes, x.coded.layout, x.coded.bits, x.coded.step, x.coded.offset, values);
  return values;
}

/// cuDNN's backward needs an o and a log-sum-exp that belong to its q, k and v: where these were decoded, its forward runs again.
void cudnn_grad(const Tensor& d_o, const AttentionOperand& q_rows, const AttentionOperand& k_rows, const AttentionOperand& v_rows, const Tensor& o,
                const Tensor& lse, int64_t heads, double scale, const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  const Tensor q = decode(q_rows, dq), k = decode(k_rows, dk), v = decode(v_rows, dv);
  if (o.defined() && lse.defined()) return cudnn_attention_grad(d_o, q, k, v, o, lse, heads, scale, dq, dk, dv);
  const Tensor own_o = empty_like(d_o, dq.dtype()), own_lse = Tensor::empty({dq.dim(0), heads, dq.dim(1)}, DType::f32, dq.device());
  cudnn_attention(q, k, v, heads, scale, own_o, own_lse);
  cudnn_attention_grad(d_o, q, k, v, own_o, own_lse, heads, scale, dq, dk, dv);
}

}  // namespace

void attention(const Tensor& q_rows, const Tensor& k_rows, const Tensor& v_rows, int64_t heads, double scale, const Tensor& o_rows,
               const Tensor& lse, AttentionBy by, const QkvCodes& codes) {
  if (by == AttentionBy::engine && has_fused_kernel(o_rows, heads))
    return fused_attention(q_rows, k_rows, v_rows, heads, scale, o_rows, lse, codes);
  if (codes[0].defined()) quantize_running(q_rows, codes[0]);
  if (codes[1].defined()) quantize_running(k_rows, codes[1]);
  if (codes[2].defined()) quantize_running(v_rows, codes[2]);
  if (by == AttentionBy::cudnn) return cudnn_attention(q_rows, k_rows, v_rows, heads, scale, o_rows, lse);
  const Tensor q = by_head(q_rows, heads), k = by_head(k_rows, heads), v = by_head(v_rows, heads), o = by_head(o_rows, heads);
  const Tensor scores = score_buffer(q, score_type(q));
  const Tensor rounded = q.dtype() == scores.dtype() ? scores : score_buffer(q, q.dtype());
  by_turns(q, [&](int64_t from, int64_t count) {
    const auto part = [&](const Tensor& t) { return t.narrow(0, from, count); };
    const Tensor s = head(scores, count), p = head(rounded, count);
    matmul(part(q), part(k).transpose(-1, -2), s);
    attention_softmax(s, scale, p, part(lse));
    matmul(p, part(v), part(o));
  });
}

void attention_grad(const Tensor& d_o, const AttentionOperand& q_rows, const AttentionOperand& k_rows, const AttentionOperand& v_rows,
                    const Tensor& o, const Tensor& lse, int64_t heads, double scale, const Tensor& dq_rows, const Tensor& dk_rows,
                    const Tensor& dv_rows, AttentionBy by) {
  if (by == AttentionBy::cudnn) return cudnn_grad(d_o, q_rows, k_rows, v_rows, o, lse, heads, scale, dq_rows, dk_rows, dv_rows);
  if (has_fused_kernel(dq_rows, heads))
    return fused_attention_grad(d_o, q_rows, k_rows, v_rows, o, lse, heads, scale, dq_rows, dk_rows, dv_rows);
  const Tensor q = by_head(decode(q_rows, dq_rows), heads), k = by_head(decode(k_rows, dq_rows), heads);
  const Tensor v = by_head(decode(v_rows, dq_rows), heads);
  const Tensor dq = by_head(dq_rows, heads), dk = by_head(dk_rows, heads), dv = by_head(dv_rows, heads);
  const DType wide = score_type(q);
  const bool narrow = q.dtype() != wide;
  const Tensor probabilities = score_buffer(q, wide), gradients = score_buffer(q, wide);
  const Tensor rounded_p = narrow ? score_buffer(q, q.dtype()) : Tensor(), rounded_ds = narrow ? score_buffer(q, q.dtype()) : gradients;
  const Tensor delta = o.defined() ? Tensor::empty({q.dim(0), q.dim(1), q.dim(2)}, wide, q.device()) : Tensor();
  const Tensor own_lse = lse.defined() ? Tensor() : Tensor::empty({q.dim(0), q.dim(1), q.dim(2)}, wide, q.device());
  if (o.defined()) attention_delta(d_o, o, delta);
  by_turns(q, [&](int64_t from, int64_t count) {
    const auto part = [&](const Tensor& t) { return t.defined() ? t.narrow(0, from, count) : t; };
    const Tensor p = head(probabilities, count), dp = head(gradients, count), ds = head(rounded_ds, count);
    matmul(part(q), part(k).transpose(-1, -2), p);
    if (lse.defined()) attention_probabilities(p, scale, part(lse), p);
    else attention_softmax(p, scale, p, part(own_lse));
    Tensor p_in = p;
    if (narrow) {
      p_in = head(rounded_p, count);
      copy(p, p_in);
    }
    const Tensor d_heads = part(d_o).split_last(q.dim(3)).transpose(1, 2);
    matmul(p_in.transpose(-1, -2), d_heads, part(dv));
    matmul(d_heads, part(v).transpose(-1, -2), dp);
    attention_softmax_grad(dp, p, part(delta), scale, ds);
    matmul(ds, part(k), part(dq));
    matmul(ds.transpose(-1, -2), part(q), part(dk));
  });
}

}  // namespace mesa::kernels
