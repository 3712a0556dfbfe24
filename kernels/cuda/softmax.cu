// y_j = exp(scale x_j - max) / sum, lse = log sum_j exp(scale x_j), over the last axis; the probabilities again are exp(scale x_j - lse).
#include "mesa/kernels/norm.h"
#include "rows.h"

namespace mesa::kernels::cuda {

namespace {

template <class X, class Y>
struct SoftmaxRow {
  using A = Acc<X>;
  static constexpr bool kOften = sizeof(X) >= sizeof(Y);
  Rows<X> x;
  Rows<Y> y;  // may be x
  A* lse;     // or null
  int64_t width;
  A scale;

  template <class Team>
  __device__ void operator()(Team team, int64_t row) const {
    constexpr int V = Team::kVector;
    Values<Team, X> values(row_at(x, row), width);
    A top = -INFINITY, sum = 0;
    team.each(width, [&](int p, auto c) {
      const A(&v)[V] = values.at(p, c);
#pragma unroll
      for (int i = 0; i < V; ++i) top = Max{}(v[i], top);  // passes over a NaN, which comes back in the sum
    });
    top = scale * team.reduce(top, Max{}, A(-INFINITY));
    team.each(width, [&](int p, auto c) {
      A(&v)[V] = values.at(p, c);
      exponentiate(v, top);
#pragma unroll
      for (int i = 0; i < V; ++i) sum += v[i];
    });
    sum = team.sum(sum);
    const A inverse = A(1) / sum;
    team.each(width, [&](int p, auto c) {
      A(&v)[V] = values.at(p, c);
      if constexpr (!Team::kKeeps) exponentiate(v, top);
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] *= inverse;
      store_pack(row_at(y, row) + c, v);
    });
    if (lse && team.leads()) lse[row] = top + std::log(sum);
  }

  template <int V>
  __device__ void exponentiate(A (&v)[V], A top) const {
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = scalar::exp_nonpositive(scale * v[i] - top);
  }
};

template <class X, class Y>
struct ProbabilityRow {
  using A = Acc<X>;
  static constexpr bool kOften = std::is_same_v<X, float>;
  Rows<X> s;
  Rows<Y> p;  // may be s
  const A* lse;
  int64_t width;
  A scale;

  template <class Team>
  __device__ void operator()(Team team, int64_t row) const {
    constexpr int V = Team::kVector;
    Values<Team, X> values(row_at(s, row), width);
    const A shift = lse[row];
    team.each(width, [&](int piece, auto c) {
      A(&v)[V] = values.at(piece, c);
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] = scalar::exp_(scale * v[i] - shift);
      store_pack(row_at(p, row) + c, v);
    });
  }
};

template <class X, class Y>
void run_softmax(const char* name, const Tensor& x, double scale, const Tensor& y, Acc<X>* lse) {
  using A = Acc<X>;
  constexpr int V = kVectorOf<X, Y>;
  const SoftmaxRow<X, Y> softmax{rows_of<X>(x), rows_of<Y>(y), lse, width_of(x), static_cast<A>(scale)};
  launch_rows<V>(name, x.rows(), softmax.width, in_vectors<V>(softmax.width, softmax.x, softmax.y), softmax);
}

}  // namespace

void softmax(const Tensor& x, const Tensor& y) {
  check(x.shape() == y.shape(), "softmax: tensors of shapes ", x.shape(), " and ", y.shape());
  dispatch(x.dtype(), y.dtype(), [&](auto tx, auto ty) { run_softmax<decltype(tx), decltype(ty)>("softmax", x, 1, y, nullptr); });
}

void attention_softmax(const Tensor& s, double scale, const Tensor& p, const Tensor& lse) {
  check_rows(s, p, "attention_softmax");
  check_row_values(lse, s.rows(), "lse");
  check(scale > 0, "attention_softmax: the scale is ", scale, " but must be positive");
  dispatch_wide(s.dtype(), [&](auto ts) {
    using S = decltype(ts);
    dispatch(s.dtype(), p.dtype(), [&](auto same, auto tp) {
      if constexpr (std::is_same_v<decltype(same), S>) run_softmax<S, decltype(tp)>("attention_softmax", s, scale, p, lse.data<S>());
    });
  });
}

void attention_probabilities(const Tensor& s, double scale, const Tensor& lse, const Tensor& p) {
  const int64_t width = width_of(s), rows = s.rows();
  check_rows(s, p, "attention_probabilities");
  check_row_values(lse, rows, "lse");
  dispatch(s.dtype(), p.dtype(), [&](auto ts, auto tp) {
    using S = decltype(ts);
    using P = decltype(tp);
    using A = Acc<S>;
    constexpr int V = kVectorOf<S, P>;
    const ProbabilityRow<S, P> again{rows_of<S>(s), rows_of<P>(p), lse.data<A>(), width, static_cast<A>(scale)};
    launch_rows<V>("attention_probabilities", rows, width, in_vectors<V>(width, again.s, again.p), again);
  });
}

}  // namespace mesa::kernels::cuda
