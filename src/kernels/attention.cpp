#include "mesa/kernels/attention.h"

#include <algorithm>

#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/matmul.h"
#include "mesa/kernels/norm.h"

namespace mesa::kernels {
namespace {

DType score_type(const Tensor& q) { return q.dtype() == DType::f64 ? DType::f64 : DType::f32; }

/// What attends among itself: the tokens of an image, or of a window of it; or to as many keys of its own. Attention works through them in
/// turns.
class Sequences {
 public:
  Sequences(const Tensor& q, const Tensor& k, int64_t heads, const WindowBias& bias)
      : windows_(bias.windows),
        count_(bias.defined() ? q.dim(0) * windows_.count() : q.dim(0)),
        queries_(bias.defined() ? windows_.length() : q.dim(1)),
        keys_(bias.defined() ? windows_.length() : k.dim(1)),
        heads_(heads),
        gpu_(is_gpu(q.device())) {
    if (!bias.defined()) return;
    windows_.validate(q.dim(1));
    check(k.dim(1) == q.dim(1), "windows of ", q.dim(1), " queries and ", k.dim(1), " keys");
  }

  int64_t count() const { return count_; }
  /// Scores of a turn (f32, [sequences, H, N, M]) should stay in the cores' second-level caches; on a GPU they should be worth a launch.
  int64_t of_a_turn() const {
    const int64_t score_bytes = gpu_ ? 1 << 26 : 1 << 21;
    const int64_t one = heads_ * queries_ * pitch() * 4;
    return std::clamp<int64_t>(score_bytes / std::max<int64_t>(one, 1), 1, std::max<int64_t>(count_, 1));
  }
  template <class Turn>
  void by_turns(const Turn& turn) const {
    for (int64_t from = 0; from < count_; from += of_a_turn()) turn(from, std::min(of_a_turn(), count_ - from));
  }

  /// Sequences of x [B, N, C] as [count, n, C]: a view, or windows that are copied together.
  Tensor take(const Tensor& x, int64_t from, int64_t count) const {
    const Tensor part = room(x, from, count);
    if (windows_.defined()) gather_windows(x, windows_, from, part);
    return part;
  }
  /// Where to write sequences of x; `put` then brings them there.
  Tensor room(const Tensor& x, int64_t from, int64_t count) const {
    return windows_.defined() ? Tensor::empty({count, queries_, x.dim(2)}, x.dtype(), x.device()) : x.narrow(0, from, count);
  }
  void put(const Tensor& part, const Tensor& x, int64_t from) const {
    if (windows_.defined()) scatter_windows(part, windows_, from, x);
  }

  /// On a GPU rows of scores begin at multiples of 16 bytes: of an odd number of keys its matrix units would read single elements. (Those
  /// of windows are summed as one row each.)
  Tensor scores(DType dtype, Device device) const {
    return Tensor::empty({of_a_turn(), heads_, queries_, pitch()}, dtype, device).narrow(-1, 0, keys_);
  }
  /// A number for each row of each head.
  Tensor lines(DType dtype, Device device) const { return Tensor::empty({count_, heads_, queries_}, dtype, device); }

 private:
  int64_t pitch() const { return gpu_ && !windows_.defined() ? (keys_ + 7) / 8 * 8 : keys_; }

  Windows windows_;
  int64_t count_, queries_, keys_, heads_;
  bool gpu_;
};

/// The first `count` sequences of a turn's buffer.
Tensor head(const Tensor& t, int64_t count) { return t.dim(0) == count ? t : t.narrow(0, 0, count); }

/// Scores with what fills up their rows.
Tensor whole(const Tensor& scores) {
  if (scores.numel() == 0) return scores;
  return scores.as_strided({scores.dim(0), scores.dim(1), scores.dim(2), scores.strides()[-2]}, scores.strides(), scores.offset());
}

/// A bias table laid out for the scores of any window.
class Bias {
 public:
  Bias(const WindowBias& of, int64_t heads) : of_(of) {
    if (!of.defined()) return;
    check(of.table.rank() == 2 && of.table.dim(1) == heads, "a table of biases ", of.table.shape(), " for ", heads, " heads");
    pairs_ = Tensor::empty({heads, of.windows.length(), of.windows.length()}, of.table.dtype(), of.table.device());
    expand_bias(of.table, of.windows, pairs_);
  }
  /// Adds to the scores of sequences from.. on; returns the factor that is left to apply to them.
  double add(const Tensor& s, double scale, int64_t from) const {
    if (!of_.defined()) return scale;
    add_window_bias(s, scale, pairs_, of_.windows, from, s);
    return 1;
  }

 private:
  const WindowBias& of_;
  Tensor pairs_;
};

/// The gradient of a bias table: that of biased scores, summed over windows in their order.
class BiasGradient {
 public:
  BiasGradient(const WindowBias& of, int64_t heads, bool of_nothing) : of_(of) {
    if (!of.d_table.defined()) return;
    sum_ = Tensor::empty({heads, of.windows.length(), of.windows.length()}, of.d_table.dtype(), of.d_table.device());
    if (of_nothing) fill(sum_, 0);
  }
  bool wanted() const { return sum_.defined(); }
  void add(const Tensor& ds, bool first) { sum_rows(ds.reshape({ds.dim(0), sum_.numel()}), sum_.reshape({sum_.numel()}), !first); }
  /// `factor`: what turns the gradients that were added into those of biased scores.
  void finish(double factor) const { expand_bias_grad(sum_, of_.windows, factor, of_.d_table, of_.accumulate); }

 private:
  const WindowBias& of_;
  Tensor sum_;
};

/// [B, N, C] -> [B, H, N, C/H], a view.
Tensor by_head(const Tensor& x, int64_t heads) { return x.split_last(x.dim(-1) / heads).transpose(1, 2); }

bool has_fused_kernel(const Tensor& o, int64_t heads, const Windows& windows) {
  const int64_t head = o.dim(2) / heads;
  if (!is_gpu(o.device()) || fused_attention.cuda == nullptr || o.dtype() != DType::bf16) return false;
  return windows.defined() ? head == 32 && windows.length() <= 1024 : head == 32 || head == 64;
}

Tensor decode(const AttentionOperand& x, const Tensor& like) { return x.values.defined() ? x.values : decoded(x.coded, like); }

/// For plans: cuDNN's backward keeps dS in its workspace, 2 B H N^2 bytes with N rounded up to 64 rows of 128 columns.
void plan_workspace(const Tensor& dq, int64_t heads) {
  const auto up = [n = dq.dim(1)](int64_t unit) { return (n + unit - 1) / unit * unit; };
  if (dq.is_meta()) Tensor::empty({dq.dim(0), heads, up(64), up(128)}, DType::bf16, dq.device());
}

/// cuDNN's backward needs an o and a log-sum-exp that belong to its q, k and v: where these were decoded, its forward runs again.
void cudnn_grad(const Tensor& d_o, const AttentionOperand& q_rows, const AttentionOperand& k_rows, const AttentionOperand& v_rows,
                const Tensor& o, const Tensor& lse, int64_t heads, double scale, const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  const Tensor q = decode(q_rows, dq), k = decode(k_rows, dk), v = decode(v_rows, dv);
  const auto grad = [&](const Tensor& from_o, const Tensor& from_lse) {
    plan_workspace(dq, heads);
    cudnn_attention_grad(d_o, q, k, v, from_o, from_lse, heads, scale, dq, dk, dv);
  };
  if (o.defined() && lse.defined()) return grad(o, lse);
  const Tensor own_o = empty_like(d_o, dq.dtype()), own_lse = Tensor::empty({dq.dim(0), heads, dq.dim(1)}, DType::f32, dq.device());
  cudnn_attention(q, k, v, heads, scale, own_o, own_lse);
  grad(own_o, own_lse);
}

}  // namespace

void attention(const Tensor& q_rows, const Tensor& k_rows, const Tensor& v_rows, int64_t heads, double scale, const Tensor& o_rows,
               const Tensor& lse, AttentionBy by, const QkvCodes& codes, const WindowBias& windows) {
  if (by == AttentionBy::engine && has_fused_kernel(o_rows, heads, windows.windows))
    return fused_attention(q_rows, k_rows, v_rows, heads, scale, o_rows, lse, codes, windows);
  if (codes[0].defined()) encode(q_rows, codes[0]);
  if (codes[1].defined()) encode(k_rows, codes[1]);
  if (codes[2].defined()) encode(v_rows, codes[2]);
  if (by == AttentionBy::cudnn) return cudnn_attention(q_rows, k_rows, v_rows, heads, scale, o_rows, lse);
  const Sequences all(q_rows, k_rows, heads, windows);
  const Bias bias(windows, heads);
  const Tensor scores = all.scores(score_type(q_rows), q_rows.device());
  const Tensor rounded = q_rows.dtype() == scores.dtype() ? scores : all.scores(q_rows.dtype(), q_rows.device());
  all.by_turns([&](int64_t from, int64_t count) {
    const auto part = [&](const Tensor& x) { return by_head(all.take(x, from, count), heads); };
    const Tensor s = head(scores, count), p = head(rounded, count), o = all.room(o_rows, from, count);
    matmul(part(q_rows), part(k_rows).transpose(-1, -2), s);
    attention_softmax(s, bias.add(s, scale, from), p, lse.narrow(0, from, count));
    matmul(p, part(v_rows), by_head(o, heads));
    all.put(o, o_rows, from);
  });
}

int64_t attention_grad_parts(const Tensor& q, int64_t heads, AttentionBy by, const Windows& windows) {
  constexpr int64_t kTile = 16, kTilesOfABlock = 8;
  constexpr int64_t kMost = 960;  // of more tokens blocks may share the queries of a key: none of them has all of its dk
  const int64_t tokens = windows.defined() ? windows.length() : q.dim(1);
  if (by != AttentionBy::engine || !has_fused_kernel(q, heads, windows) || tokens > kMost) return 0;
  const int64_t tiles = (tokens + kTile - 1) / kTile, blocks = (tiles + kTilesOfABlock - 1) / kTilesOfABlock;
  return q.dim(0) * (windows.defined() ? windows.count() : 1) * blocks;
}

void attention_grad(const Tensor& d_o, const AttentionOperand& q_coded, const AttentionOperand& k_coded, const AttentionOperand& v_coded,
                    const Tensor& o, const Tensor& lse, int64_t heads, double scale, const Tensor& dq_rows, const Tensor& dk_rows,
                    const Tensor& dv_rows, AttentionBy by, const WindowBias& windows, const Tensor& sums) {
  if (sums.defined())
    check(attention_grad_parts(dq_rows, heads, by, windows.windows) > 0, "attention_grad: no sums are made beside gradients of ",
          dq_rows.shape());
  if (by == AttentionBy::cudnn) return cudnn_grad(d_o, q_coded, k_coded, v_coded, o, lse, heads, scale, dq_rows, dk_rows, dv_rows);
  if (has_fused_kernel(dq_rows, heads, windows.windows))
    return fused_attention_grad(d_o, q_coded, k_coded, v_coded, o, lse, heads, scale, dq_rows, dk_rows, dv_rows, windows, sums);
  const Tensor q_rows = decode(q_coded, dq_rows), k_rows = decode(k_coded, dk_rows), v_rows = decode(v_coded, dv_rows);
  const Device device = q_rows.device();
  const Sequences all(q_rows, k_rows, heads, windows);
  const Bias bias(windows, heads);
  BiasGradient d_bias(windows, heads, all.count() == 0);
  const DType wide = score_type(q_rows), narrow = q_rows.dtype();
  const Tensor probabilities = all.scores(wide, device), gradients = all.scores(wide, device);
  const Tensor rounded_p = narrow != wide ? all.scores(narrow, device) : Tensor(),
               rounded_ds = narrow != wide ? all.scores(narrow, device) : Tensor();
  // The sums over windows are of other rows than o's, which then come from P and dP.
  const Tensor delta = o.defined() && !windows.defined() ? all.lines(wide, device) : Tensor();
  const Tensor own_lse = lse.defined() ? Tensor() : all.lines(wide, device);
  if (delta.defined()) attention_delta(d_o, o, delta);
  all.by_turns([&](int64_t from, int64_t count) {
    const auto part = [&](const Tensor& x) { return by_head(all.take(x, from, count), heads); };
    const auto lines = [&](const Tensor& x) { return x.defined() ? x.narrow(0, from, count) : x; };
    const auto rounded = [&](const Tensor& x, const Tensor& buffer) {
      if (!buffer.defined()) return x;
      copy(whole(x), whole(head(buffer, count)));
      return head(buffer, count);
    };
    const Tensor p = head(probabilities, count), ds = head(gradients, count);
    const Tensor q = part(q_rows), k = part(k_rows), d_heads = part(d_o);
    matmul(q, k.transpose(-1, -2), p);
    const double factor = bias.add(p, scale, from);
    if (lse.defined())
      attention_probabilities(p, factor, lines(lse), p);
    else
      attention_softmax(p, factor, p, lines(own_lse));
    const auto product = [&](const Tensor& a, const Tensor& b, const Tensor& rows) {
      const Tensor result = all.room(rows, from, count);
      matmul(a, b, by_head(result, heads));
      all.put(result, rows, from);
    };
    product(rounded(p, rounded_p).transpose(-1, -2), d_heads, dv_rows);
    matmul(d_heads, part(v_rows).transpose(-1, -2), ds);
    const Tensor direct = rounded_ds.defined() && !d_bias.wanted() ? head(rounded_ds, count) : ds;
    attention_softmax_grad(ds, p, lines(delta), scale, direct);
    if (d_bias.wanted()) d_bias.add(ds, from == 0);
    const Tensor ds_in = d_bias.wanted() ? rounded(ds, rounded_ds) : direct;
    product(ds_in, k, dq_rows);
    product(ds_in.transpose(-1, -2), q, dk_rows);
  });
  if (d_bias.wanted()) d_bias.finish(1 / scale);
}

}  // namespace mesa::kernels
