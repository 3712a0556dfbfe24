// dx_j = scale y_j (dy_j - delta), delta = sum_j y_j dy_j, over the last axis; of an attention's rows also delta = sum_d do_d o_d.
#include "mesa/kernels/norm.h"
#include "rows.h"

namespace mesa::kernels::cuda {

namespace {

template <class G, class Y, class X>
struct SoftmaxGradRow {
  using A = Acc<Y>;
  static constexpr bool kOften = std::is_same_v<G, Y> && sizeof(Y) >= sizeof(X);
  Rows<G> dy;
  Rows<Y> y;
  Rows<X> dx;      // may be dy or y
  const A* delta;  // or null: computed here
  int64_t width;
  A scale;

  template <class Team>
  __device__ void operator()(Team team, int64_t row) const {
    constexpr int V = Team::kVector;
    Values<Team, G> gradients(row_at(dy, row), width);
    Values<Team, Y> values(row_at(y, row), width);
    A mean = 0;
    if (delta) {
      mean = delta[row];
    } else {
      team.each(width, [&](int p, auto c) {
        const A(&g)[V] = gradients.at(p, c), (&v)[V] = values.at(p, c);
#pragma unroll
        for (int i = 0; i < V; ++i) mean += g[i] * v[i];
      });
      mean = team.sum(mean);
    }
    team.each(width, [&](int p, auto c) {
      const A(&g)[V] = gradients.at(p, c), (&v)[V] = values.at(p, c);
      A out[V];
#pragma unroll
      for (int i = 0; i < V; ++i) out[i] = scale * v[i] * (g[i] - mean);
      store_pack(row_at(dx, row) + c, out);
    });
  }
};

template <class G, class Y, class X>
void run_grad(const char* name, const Tensor& dy, const Tensor& y, const Tensor& delta, double scale, const Tensor& dx) {
  using A = Acc<Y>;
  constexpr int V = kVectorOf<G, Y, X>;
  const SoftmaxGradRow<G, Y, X> grad{rows_of<G>(dy), rows_of<Y>(y),        rows_of<X>(dx), delta.defined() ? delta.data<A>() : nullptr,
                                     width_of(y),    static_cast<A>(scale)};
  launch_rows<V>(name, y.rows(), grad.width, in_vectors<V>(grad.width, grad.dy, grad.y, grad.dx), grad);
}

/// delta of one head of one token: the work of kDotLanes lanes, in pieces of V.
constexpr int kDotLanes = 8;
template <class G, class O, int V>
__global__ void head_dots(Rows<G> d_o, Rows<O> o, Acc<O>* delta, int64_t tokens, int64_t heads, int64_t width, int64_t count) {
  const int64_t item = global_index() / kDotLanes, row = item / heads, h = item % heads;
  Acc<O> sum = 0;
  if (item < count) {
    const G* g = row_at(d_o, row) + h * width;
    const O* values = row_at(o, row) + h * width;
    for (int64_t c = threadIdx.x % kDotLanes * V; c < width; c += kDotLanes * V) {
      Acc<O> a[V], b[V];
      load_pack(g + c, a);
      load_pack(values + c, b);
#pragma unroll
      for (int i = 0; i < V; ++i) sum += a[i] * b[i];
    }
  }
  sum = warp_reduce<kDotLanes>(sum, Sum{});
  if (item < count && threadIdx.x % kDotLanes == 0) delta[(row / tokens * heads + h) * tokens + row % tokens] = sum;
}

}  // namespace

void softmax_grad(const Tensor& dy, const Tensor& y, const Tensor& dx) {
  check(dy.shape() == y.shape() && dx.shape() == y.shape(), "softmax_grad: tensors of shapes ", dy.shape(), ", ", y.shape(), " and ",
        dx.shape());
  dispatch(dy.dtype(), y.dtype(), dx.dtype(),
           [&](auto tg, auto ty, auto tx) { run_grad<decltype(tg), decltype(ty), decltype(tx)>("softmax_grad", dy, y, Tensor(), 1, dx); });
}

void attention_softmax_grad(const Tensor& dp, const Tensor& p, const Tensor& delta, double scale, const Tensor& ds) {
  check_rows(dp, p, "attention_softmax_grad: dp");
  check_rows(ds, p, "attention_softmax_grad: ds");
  if (delta.defined()) check_row_values(delta, p.rows(), "delta");
  dispatch(dp.dtype(), p.dtype(), ds.dtype(), [&](auto tg, auto tp, auto ts) {
    run_grad<decltype(tg), decltype(tp), decltype(ts)>("attention_softmax_grad", dp, p, delta, scale, ds);
  });
}

void attention_delta(const Tensor& d_o, const Tensor& o, const Tensor& delta) {
  check(o.rank() == 3 && d_o.shape() == o.shape(), "attention_delta: tensors of shapes ", d_o.shape(), " and ", o.shape());
  check(delta.rank() == 3 && delta.is_contiguous() && delta.dim(0) == o.dim(0) && delta.dim(2) == o.dim(1),
        "attention_delta: delta of shape ", delta.shape(), " for outputs of shape ", o.shape());
  const int64_t heads = delta.dim(1), tokens = o.dim(1);
  check(heads > 0 && o.dim(2) % heads == 0, "attention_delta: ", heads, " heads do not divide ", o.dim(2), " channels");
  const int64_t width = o.dim(2) / heads, count = o.rows() * heads;
  if (count == 0) return;
  dispatch(d_o.dtype(), o.dtype(), [&](auto tg, auto to) {
    using G = decltype(tg);
    using O = decltype(to);
    constexpr int V = kVectorOf<G, O>, threads = 256;
    const Rows<G> grad = rows_of<G>(d_o);
    const Rows<O> in = rows_of<O>(o);
    const auto kernel = in_vectors<V>(width, grad, in) ? &head_dots<G, O, V> : &head_dots<G, O, 1>;
    launch("attention_delta", kernel, static_cast<unsigned>(ceil_div(count, threads / kDotLanes)), threads, 0, grad, in,
           delta.data<Acc<O>>(), tokens, heads, width, count);
  });
}

}  // namespace mesa::kernels::cuda
