// relu(x) = max(x, 0);  gelu(x) = x Phi(x), gelu'(x) = Phi(x) + x phi(x) with the exact normal distribution.
#include "mesa/kernels/elementwise.h"
#include "pointwise.h"

namespace mesa::kernels::cuda {

namespace {

struct Relu {
  template <class A>
  __device__ A operator()(A x) const {
    return scalar::relu(x);
  }
};
struct ReluGrad {
  template <class A>
  __device__ A operator()(A dy, A x) const {
    return scalar::relu_grad(dy, x);
  }
};
struct Gelu {
  template <class A>
  __device__ A operator()(A x) const {
    return scalar::gelu(x);
  }
};
struct GeluGrad {
  template <class A>
  __device__ A operator()(A dy, A x) const {
    return dy * scalar::gelu_slope(x);
  }
};
struct GeluSlope {
  template <class A>
  __device__ A operator()(A x) const {
    return scalar::gelu_slope(x);
  }
};

/// Both results of one x: the compiler sees that they share the exponential.
template <int N, class X, class Y>
__global__ void gelu_and_slope_kernel(int64_t n, const X* x, Y* y, Y* slope) {
  for (int64_t i = global_index() * N; i + N <= n; i += global_stride() * N) {
    const auto v = elements_at<N>(x + i);
    store_pack(y + i, apply<N>(Gelu{}, v).v);
    store_pack(slope + i, apply<N>(GeluSlope{}, v).v);
  }
  if (const int64_t last = n / N * N + global_index(); N > 1 && last < n) {
    const auto v = load(x + last);
    store(y + last, scalar::gelu(v));
    store(slope + last, scalar::gelu_slope(v));
  }
}

}  // namespace

void relu(const Tensor& x, const Tensor& y) { map("relu", Relu{}, x, y); }

void relu_grad(const Tensor& dy, const Tensor& x, const Tensor& dx) { map("relu_grad", ReluGrad{}, dy, x, dx); }

void gelu(const Tensor& x, const Tensor& y) { map("gelu", Gelu{}, x, y); }

void gelu_grad(const Tensor& dy, const Tensor& x, const Tensor& dx) { map("gelu_grad", GeluGrad{}, dy, x, dx); }

void gelu_and_slope(const Tensor& x, const Tensor& y, const Tensor& slope) {
  check_alike(x, y, "gelu_and_slope");
  check_alike(x, slope, "gelu_and_slope");
  const int64_t n = x.numel();
  if (n == 0) return;
  dispatch(x.dtype(), y.dtype(), [&](auto tx, auto ty) {
    using X = decltype(tx);
    using Y = decltype(ty);
    constexpr int N = kLaneElements<X, Y>;
    const X* px = x.data<X>();
    Y *py = y.data<Y>(), *ps = slope.data<Y>();
    const bool packed = aligned(px, N * sizeof(X)) && aligned(py, N * sizeof(Y)) && aligned(ps, N * sizeof(Y));
    launch("gelu_and_slope", packed ? &gelu_and_slope_kernel<N, X, Y> : &gelu_and_slope_kernel<1, X, Y>,
           grid_for(n, (packed ? N : 1) * kMapThreads, kMapBlocks), kMapThreads, 0, n, px, py, ps);
  });
}

}  // namespace mesa::kernels::cuda
