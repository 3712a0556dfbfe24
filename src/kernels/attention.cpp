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

}  // namespace

void attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale, const Tensor& o, const Tensor& lse) {
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

void attention_grad(const Tensor& d_o, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& lse, double scale,
                    const Tensor& dq, const Tensor& dk, const Tensor& dv) {
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
