#include "mesa/kernels/attention.h"

#include "mesa/kernels/elementwise.h"
#include "mesa/ops/ops.h"

namespace mesa {
namespace {

/// Third `i` of the packed projection, as rows of C.
Tensor third(const Tensor& qkv, int i) { return qkv.narrow(-1, i * (qkv.dim(-1) / 3), qkv.dim(-1) / 3); }

/// [B, N, C] -> [B, H, N, C/H], a view.
Tensor by_head(const Tensor& x, int64_t heads) { return x.split_last(x.dim(-1) / heads).transpose(1, 2); }

void check_packed(const Var& qkv, int64_t heads) {
  check(qkv.value().rank() == 3 && heads > 0 && qkv.dim(-1) % (3 * heads) == 0, "attention with ", heads,
        " heads needs [B, N, 3 C] with C a multiple of ", heads, ", not ", qkv.shape());
}

constexpr const char* kSlots[] = {"q", "k", "v"};

/// Where q, k and v lie: each is columns from..from+C-1 of an input.
struct Operands {
  std::vector<Var> inputs;
  int64_t width;  ///< C
  struct Part {
    int input;
    int64_t from;
  };
  std::array<Part, 3> parts;

  Tensor part(int i) const { return of(inputs[parts[i].input].value(), i); }
  /// The same of a tensor of that input's shape.
  Tensor of(const Tensor& x, int i) const { return x.narrow(-1, parts[i].from, width); }
};

/// q, k and v as views of the inputs, unless `saved` has them already. Where only some of an input's are kept exactly, those are copied: a
/// view would pin all of it.
void save_parts(const Op& op, const Operands& x, std::array<Saved, 3>& saved) {
  const auto shares = [&](int i) { return op.shares_input(kSlots[i], x.inputs[x.parts[i].input].dtype()); };
  for (int i = 0; i < 3; ++i) {
    if (saved[i].defined()) continue;
    bool whole = true;  // all of this input is kept
    for (int j = 0; j < 3; ++j) whole = whole && (x.parts[j].input != x.parts[i].input || shares(j));
    Tensor part = x.part(i);
    if (!whole && shares(i)) {
      const Tensor own = empty_like(part);
      kernels::copy(part, own);
      part = own;
    }
    saved[i] = op.save(kSlots[i], part);
  }
}

/// Codes go to the kernel as they are, so that it may decode them on the way in.
kernels::AttentionOperand operand(const Saved& saved) {
  if (const auto coded = saved.coded()) return {{}, *coded};
  return {saved.get(), {}};
}

struct Form {
  int64_t heads;
  double scale;
  kernels::AttentionBy by;
  kernels::Windows windows;
};

/// Of whole images, or with a `table` of windows.
Var fused(const Op& op, const Operands& x, const Var& table, const Form& f) {
  const Tensor q = x.part(0), bias = table.value();
  const int64_t B = q.dim(0), N = q.dim(1);
  const Tensor o = Tensor::empty({B, N, x.width}, q.dtype(), q.device());
  const Shape rows = table.defined() ? Shape{B * f.windows.count(), f.heads, f.windows.length()} : Shape{B, f.heads, N};
  const Tensor lse = Tensor::empty(rows, q.dtype() == DType::f64 ? DType::f64 : DType::f32, q.device());
  std::array<Saved, 3> saved;
  kernels::QkvCodes codes;
  for (int i = 0; i < 3; ++i) {
    const SavedAhead ahead = op.open(kSlots[i], x.part(i));
    saved[i] = ahead.saved, codes[i] = ahead.codes;
  }
  kernels::attention(q, x.part(1), x.part(2), f.heads, f.scale, o, lse, f.by, codes, {f.windows, bias, {}, false});
  if (!op.recording()) return Var(o);
  save_parts(op, x, saved);
  // Rows of exp(scale q k^T - lse) from decoded q and k do not sum to one, so they are normalized again and neither lse nor o is read.
  const bool exact = saved[0].error() == 0 && saved[1].error() == 0 && saved[2].error() == 0;
  // One copy with the projection behind, which keeps the same buffer; where that is lossy, delta comes from P and dP instead.
  // What is padded goes on in another buffer.
  const bool padded = f.windows.height != f.windows.inner_height || f.windows.width != f.windows.inner_width;
  const Saved so = exact && !padded && op.shares_input("o", o.dtype()) ? op.save("o", o) : Saved();
  if (exact) op.keep("lse", lse);
  const Tensor kept_lse = exact ? lse : Tensor();
  std::vector<Shape> shapes;
  for (const Var& input : x.inputs) shapes.push_back(input.shape());
  Operands places = x;
  places.inputs.clear();  // a Var would pin its exact value
  const auto formula = [=, type = q.dtype(), has_table = table.defined(), d_table = table.defined() ? op.gradient(table) : Target()](
                           const Tensor& d_o, const Extras& extras) -> Grads {
    kernels::WindowBias windows{f.windows, bias, {}, false};
    Grads grads;
    for (const Shape& shape : shapes) grads.push_back(Tensor::empty(shape, type, d_o.device()));
    const auto gradient = [&](int i) { return places.of(grads[places.parts[i].input], i); };
    const std::array<Tensor, 3> d{gradient(0), gradient(1), gradient(2)};
    if (has_table) grads.push_back(d_table.into([&](const Tensor& to, bool add) { windows.d_table = to, windows.accumulate = add; }));
    const bool packed = shapes.size() == 1;
    const int64_t parts = extras.dx_sums && packed ? kernels::attention_grad_parts(d[0], f.heads, f.by, f.windows) : 0;
    if (parts > 0) *extras.dx_sums = Tensor::empty({parts, 3 * places.width}, DType::f32, d_o.device());
    kernels::attention_grad(d_o, operand(saved[0]), operand(saved[1]), operand(saved[2]), so.defined() ? so.get() : Tensor(), kept_lse,
                            f.heads, f.scale, d[0], d[1], d[2], f.by, windows, parts > 0 ? *extras.dx_sums : Tensor());
    return grads;
  };
  return op.record(o, formula, {});
}

Operands packed(const Var& qkv) {
  const int64_t C = qkv.dim(-1) / 3;
  return {{qkv}, C, {{{0, 0}, {0, C}, {0, 2 * C}}}};
}

}  // namespace

Var attention(const Var& qkv, int64_t heads, double scale, kernels::AttentionBy by) {
  const Op op("attention", {qkv});
  check_packed(qkv, heads);
  return fused(op, packed(qkv), {}, {heads, scale, by, {}});
}

Var attention(const Var& q, const Var& kv, int64_t heads, double scale) {
  const Op op("attention", {q, kv});
  check(q.value().rank() == 3 && kv.value().rank() == 3 && q.dim(0) == kv.dim(0) && 2 * q.dim(2) == kv.dim(2) && heads > 0 &&
            q.dim(2) % heads == 0 && q.dtype() == kv.dtype(),
        "attention with ", heads, " heads needs q [B, N, C] and kv [B, M, 2 C], not ", q.shape(), " and ", kv.shape());
  return fused(op, {{q, kv}, q.dim(2), {{{0, 0}, {1, 0}, {1, q.dim(2)}}}}, {}, {heads, scale, kernels::AttentionBy::engine, {}});
}

Var window_attention(const Var& qkv, const Var& table, int64_t heads, double scale, const kernels::Windows& windows) {
  const Op op("attention", {qkv, table});
  check_packed(qkv, heads);
  windows.validate(qkv.dim(1));
  check(table.shape() == Shape({windows.distances(), heads}), "windows of ", windows.window_height, " x ", windows.window_width, " and ",
        heads, " heads need a table of [", windows.distances(), ", ", heads, "], not ", table.shape());
  return fused(op, packed(qkv), table, {heads, scale, kernels::AttentionBy::engine, windows});
}

std::array<Var, 3> split_heads(const Var& qkv, int64_t heads) {
  const Op op("split_heads", {qkv});
  check_packed(qkv, heads);
  std::vector<Tensor> views;
  for (int i = 0; i < 3; ++i) views.push_back(by_head(third(qkv.value(), i), heads));
  const auto out = op.record(views, [heads, shape = qkv.shape(), type = qkv.dtype()](const std::vector<Tensor>& dy) -> Grads {
    Device device;
    for (const Tensor& d : dy)
      if (d.defined()) device = d.device();
    const Tensor dqkv = Tensor::empty(shape, type, device);
    for (int i = 0; i < 3; ++i) {
      const Tensor part = by_head(third(dqkv, i), heads);
      Tensor d = dy[i];
      if (!d.defined()) {  // an output that nothing used
        d = Tensor::empty(part.shape(), type, device);
        kernels::fill(d, 0);
      }
      kernels::copy(d, part);
    }
    return {dqkv};
  });
  return {out[0], out[1], out[2]};
}

Var merge_heads(const Var& x) {
  const Op op("merge_heads", {x});
  check(x.value().rank() == 4, "merge_heads needs [B, H, N, D], not ", x.shape());
  const int64_t B = x.dim(0), H = x.dim(1), N = x.dim(2), D = x.dim(3);
  const Tensor y = Tensor::empty({B, N, H * D}, x.dtype(), x.value().device());
  kernels::copy(x.value(), by_head(y, H));
  return op.record(y, [H, shape = x.shape()](const Tensor& dy) -> Grads {
    const Tensor dx = Tensor::empty(shape, dy.dtype(), dy.device());
    kernels::copy(by_head(dy, H), dx);
    return {dx};
  });
}

}  // namespace mesa
