// y_j = exp(x_j - max) / sum_k exp(x_k - max);  dx = y (dy - sum_j y_j dy_j), over the last axis.
#include "mesa/kernels/norm.h"

#include "cpu.h"

namespace mesa::kernels::MESA_ISA {

void softmax(const Tensor& x, const Tensor& y) {
  const int64_t width = width_of(x);
  check(x.shape() == y.shape(), "softmax: tensors of shapes ", x.shape(), " and ", y.shape());
  dispatch(x.dtype(), y.dtype(), [&](auto tx, auto ty) {
    using X = decltype(tx);
    using Y = decltype(ty);
    using A = Acc<X>;
    const Rows<X> in = rows_of<X>(x);
    const Rows<Y> out = rows_of<Y>(y);
    parallel_rows(x.rows(), width, [=](int64_t begin, int64_t end) {
      std::vector<A> spare(width);  // unrounded exponentials
      A* e = spare.data();
      for (int64_t row = begin; row < end; ++row) {
        const A inverse = A(1) / exponentials(in[row], width, A(1), max_of(in[row], width), e);
        Y* py = out[row];
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) store(py + j, e[j] * inverse);
      }
    });
  });
}

void softmax_grad(const Tensor& dy, const Tensor& y, const Tensor& dx) {
  const int64_t width = width_of(y);
  check(dy.shape() == y.shape() && dx.shape() == y.shape(), "softmax_grad: tensors of shapes ", dy.shape(), ", ", y.shape(), " and ",
        dx.shape());
  dispatch(dy.dtype(), y.dtype(), dx.dtype(), [&](auto tg, auto ty, auto tx) {
    using A = Acc<decltype(tx)>;
    const auto grad = rows_of<decltype(tg)>(dy);
    const auto in = rows_of<decltype(ty)>(y);
    const auto out = rows_of<decltype(tx)>(dx);
    parallel_rows(y.rows(), width, [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const auto* pg = grad[row];
        const auto* py = in[row];
        auto* px = out[row];
        const A mean = dot<A>(pg, py, width);
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) store(px + j, load(py + j) * (load(pg + j) - mean));
      }
    });
  });
}

}  // namespace mesa::kernels::MESA_ISA
