// p = exp(scale s - max) / sum, lse = log sum_j exp(scale s_j);  ds = scale p (dp - delta), delta = sum_j p_j dp_j = sum_d do_d o_d.
#include <cmath>

#include "mesa/kernels/norm.h"

#include "cpu.h"

namespace mesa::kernels::MESA_ISA {

namespace {

void check_rows(const Tensor& s, const Tensor& p, const char* name) {
  check(s.numel() == p.numel() && width_of(s) == width_of(p), name, ": tensors of shapes ", s.shape(), " and ", p.shape());
}

void check_row_values(const Tensor& values, int64_t rows, const char* name) {
  check(values.is_contiguous() && values.numel() == rows, name, " has ", values.numel(), " elements for ", rows, " rows");
}

/// One row: p <- softmax(scale s), returns log sum exp(scale s). `spare` holds the exponentials when p is too narrow for them.
template <class S, class P>
S softmax_row(const S* s, int64_t n, S scale, P* p, S* spare) {
  S* e = spare;
  if constexpr (std::is_same_v<S, P>) e = p;
  const S top = scale * max_of(s, n);
  const S sum = exponentials(s, n, scale, top, e), inverse = S(1) / sum;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) store(p + j, e[j] * inverse);
  return top + std::log(sum);
}

}  // namespace

void attention_softmax(const Tensor& s, double scale, const Tensor& p, const Tensor& lse) {
  const int64_t width = width_of(s), rows = s.rows();
  check_rows(s, p, "attention_softmax");
  check_row_values(lse, rows, "lse");
  check(scale > 0, "attention_softmax: the scale is ", scale, " but must be positive");
  dispatch_wide(s.dtype(), [&](auto ts) {
    using S = decltype(ts);
    dispatch(s.dtype(), p.dtype(), [&](auto same, auto tp) {
      using P = decltype(tp);
      if constexpr (std::is_same_v<decltype(same), S>) {
        const Rows<S> in = rows_of<S>(s);
        const Rows<P> out = rows_of<P>(p);
        S* log_sums = lse.data<S>();
        parallel_rows(rows, width, [=](int64_t begin, int64_t end) {
          std::vector<S> spare(std::is_same_v<S, P> ? 0 : width);
          for (int64_t row = begin; row < end; ++row)
            log_sums[row] = softmax_row(in[row], width, static_cast<S>(scale), out[row], spare.data());
        });
      }
    });
  });
}

void attention_probabilities(const Tensor& s, double scale, const Tensor& lse, const Tensor& p) {
  const int64_t width = width_of(s), rows = s.rows();
  check_rows(s, p, "attention_probabilities");
  check_row_values(lse, rows, "lse");
  dispatch(s.dtype(), p.dtype(), [&](auto ts, auto tp) {
    using A = Acc<decltype(ts)>;
    const auto in = rows_of<decltype(ts)>(s);
    const auto out = rows_of<decltype(tp)>(p);
    const A* log_sums = lse.data<A>();
    const A factor = static_cast<A>(scale);
    parallel_rows(rows, width, [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const auto* ps = in[row];
        auto* pp = out[row];
        const A shift = log_sums[row];
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) store(pp + j, scalar::exp_(factor * load(ps + j) - shift));
      }
    });
  });
}

void attention_softmax_grad(const Tensor& dp, const Tensor& p, const Tensor& delta, double scale, const Tensor& ds) {
  const int64_t width = width_of(p), rows = p.rows();
  check_rows(dp, p, "attention_softmax_grad: dp");
  check_rows(ds, p, "attention_softmax_grad: ds");
  if (delta.defined()) check_row_values(delta, rows, "delta");
  dispatch(dp.dtype(), p.dtype(), ds.dtype(), [&](auto tg, auto tp, auto ts) {
    using A = Acc<decltype(tp)>;
    const auto grad = rows_of<decltype(tg)>(dp);
    const auto in = rows_of<decltype(tp)>(p);
    const auto out = rows_of<decltype(ts)>(ds);
    const A* known = delta.defined() ? delta.data<A>() : nullptr;
    const A factor = static_cast<A>(scale);
    parallel_rows(rows, width, [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const auto* pg = grad[row];
        const auto* pp = in[row];
        auto* ps = out[row];
        const A mean = known ? known[row] : dot<A>(pg, pp, width);
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) store(ps + j, factor * load(pp + j) * (load(pg + j) - mean));
      }
    });
  });
}

void attention_delta(const Tensor& d_o, const Tensor& o, const Tensor& delta) {
  check(o.rank() == 3 && d_o.shape() == o.shape(), "attention_delta: tensors of shapes ", d_o.shape(), " and ", o.shape());
  check(delta.rank() == 3 && delta.is_contiguous() && delta.dim(0) == o.dim(0) && delta.dim(2) == o.dim(1),
        "attention_delta: delta of shape ", delta.shape(), " for outputs of shape ", o.shape());
  const int64_t heads = delta.dim(1), tokens = o.dim(1), width = o.dim(2);
  check(heads > 0 && width % heads == 0, "attention_delta: ", heads, " heads do not divide ", width, " channels");
  const int64_t head = width / heads;
  dispatch(d_o.dtype(), o.dtype(), [&](auto tg, auto to) {
    using A = Acc<decltype(to)>;
    const auto grad = rows_of<decltype(tg)>(d_o);
    const auto in = rows_of<decltype(to)>(o);
    A* out = delta.data<A>();
    parallel_rows(o.rows(), width, [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t h = 0; h < heads; ++h) {
          const auto* pg = grad[row] + h * head;
          const auto* po = in[row] + h * head;
          out[(row / tokens * heads + h) * tokens + row % tokens] = dot<A>(pg, po, head);
        }
      }
    });
  });
}

}  // namespace mesa::kernels::MESA_ISA
