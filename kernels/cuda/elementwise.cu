// y = value, y = a + b, y = a b, y = s x, y[m, n] = a[m, n] + b[n], y[m, n] = s[m] x[m, n].
#include "mesa/kernels/elementwise.h"
#include "pointwise.h"

namespace mesa::kernels::cuda {

namespace {

template <class A>
struct Constant {
  A value;
  __device__ A operator()() const { return value; }
};
struct Product {
  template <class A>
  __device__ A operator()(A a, A b) const {
    return a * b;
  }
};
struct Scale {
  double factor;
  template <class A>
  __device__ A operator()(A x) const {
    return static_cast<A>(factor) * x;
  }
};

template <int N, class X, class B, class Y>
__global__ void add_rows_kernel(int64_t packs, int64_t across, const X* a, const B* b, Y* y) {
  const ColumnLoop loop(packs, across);
  if (!loop.takes_part()) return;
  const auto vb = elements_at<N>(b + loop.column * N);
  loop.each([&](int64_t i) { return elements_at<N>(a + i * N); },
            [&](int64_t i, const auto& va) { store_whole(y + i * N, apply<N>(Sum{}, va, vb).v); });
}

template <class A>
struct ScaleOfRow {
  const A* factors;
  struct OfElement {
    A factor;
    __device__ A operator()(A x) const { return factor * x; }
  };
  __device__ OfElement operator()(int64_t row) const { return {factors[row]}; }
};

}  // namespace

void fill(const Tensor& y, double value) {
  check_flat(y, "fill: y");
  dispatch_float(y.dtype(), [&](auto tag) {
    using T = decltype(tag);
    map("fill", Constant<Acc<T>>{static_cast<Acc<T>>(value)}, y.numel(), y.data<T>());
  });
}

void add(const Tensor& a, const Tensor& b, const Tensor& y) { map("add", Sum{}, a, b, y); }

void mul(const Tensor& a, const Tensor& b, const Tensor& y) { map("mul", Product{}, a, b, y); }

void scale(const Tensor& x, double s, const Tensor& y) { map("scale", Scale{s}, x, y); }

void scale_rows(const Tensor& x, const Tensor& s, const Tensor& y) {
  check_alike(x, y, "scale_rows");
  check(s.is_contiguous() && s.numel() == x.rows(), "scale_rows: ", s.numel(), " factors for ", x.rows(), " rows");
  dispatch(x.dtype(), y.dtype(), [&](auto tx, auto ty) {
    using X = decltype(tx);
    map_rows("scale_rows", ScaleOfRow<Acc<X>>{s.data<Acc<X>>()}, x.rows(), width_of(x), y.data<decltype(ty)>(), x.data<X>());
  });
}

void add_rows(const Tensor& a, const Tensor& b, const Tensor& y) {
  check_alike(a, y, "add_rows");
  check_flat(b, "add_rows: b");
  if (a.numel() == 0) return;
  const int64_t width = b.numel();
  check(width > 0 && a.numel() % width == 0, "add_rows: ", width, " elements do not divide a tensor of shape ", a.shape());
  dispatch(a.dtype(), b.dtype(), y.dtype(), [&](auto ta, auto tb, auto ty) {
    using X = decltype(ta);
    using B = decltype(tb);
    using Y = decltype(ty);
    constexpr int N = kLaneElements<X, B, Y>;
    const X* pa = a.data<X>();
    const B* pb = b.data<B>();
    Y* py = y.data<Y>();
    const bool packed = width % N == 0 && aligned(pa, N * sizeof(X)) && aligned(pb, N * sizeof(B)) && aligned(py, N * sizeof(Y));
    const int64_t packs = y.numel() / (packed ? N : 1), across = width / (packed ? N : 1);
    launch("add_rows", packed ? &add_rows_kernel<N, X, B, Y> : &add_rows_kernel<1, X, B, Y>, ColumnLoop::grid(packs, across), kMapThreads,
           0, packs, across, pa, pb, py);
  });
}

}  // namespace mesa::kernels::cuda
