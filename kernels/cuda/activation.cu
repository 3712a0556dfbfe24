// relu(x) = max(x, 0), dx = dy where the bit !(x <= 0) is set;  gelu(x) = x Phi(x), gelu'(x) = Phi(x) + x phi(x) with the exact normal
// distribution.
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

/// Both results of one x: the compiler sees that they share the exponential. dx may be dy.
template <int N, class T>
__global__ void gelu_grad_and_value(int64_t n, const T* dy, const T* x, T* dx, T* y) {
  for (int64_t i = global_index() * N; i + N <= n; i += global_stride() * N) {
    const auto v = elements_at<N>(x + i), g = elements_at<N>(dy + i);
    store_pack(dx + i, apply<N>(GeluGrad{}, g, v).v);
    store_pack(y + i, apply<N>(Gelu{}, v).v);
  }
  if (const int64_t last = n / N * N + global_index(); N > 1 && last < n) {
    const auto v = load(x + last);
    store(dx + last, GeluGrad{}(load(dy + last), v));
    store(y + last, scalar::gelu(v));
  }
}

/// The `count` elements from p on as 8: in one piece if `packed` and there are so many, zeros behind the last.
template <bool packed, class T>
__device__ inline Elements<Acc<T>, 8> octet_at(const T* p, int count) {
  if (packed && count == 8) return elements_at<8>(p);
  Elements<Acc<T>, 8> v{};
#pragma unroll
  for (int k = 0; k < 8; ++k)
    if (k < count) v.v[k] = load(p + k);
  return v;
}
template <bool packed, class T, class A>
__device__ inline void store_octet(T* p, int count, const A (&v)[8]) {
  if (packed && count == 8) return store_pack(p, v);
#pragma unroll
  for (int k = 0; k < 8; ++k)
    if (k < count) store(p + k, v[k]);
}

/// One thread for the 8 elements that share a byte of the mask.
template <bool packed, class X, class Y>
__global__ void relu_mask_kernel(int64_t n, const X* x, Y* y, uint8_t* mask) {
  for (int64_t i = global_index() * 8; i < n; i += global_stride() * 8) {
    const int count = n - i < 8 ? static_cast<int>(n - i) : 8;
    auto v = octet_at<packed>(x + i, count);
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      bits |= static_cast<unsigned>(k < count && scalar::relu_passes(v.v[k])) << k;
      v.v[k] = scalar::relu(v.v[k]);
    }
    store_octet<packed>(y + i, count, v.v);
    mask[i / 8] = static_cast<uint8_t>(bits);
  }
}

/// y may be x.
template <bool packed, class X, class Y>
__global__ void apply_mask_kernel(int64_t n, const X* x, Y* y, uint8_t* mask) {
  for (int64_t i = global_index() * 8; i < n; i += global_stride() * 8) {
    const int count = n - i < 8 ? static_cast<int>(n - i) : 8;
    auto v = octet_at<packed>(x + i, count);
    const unsigned bits = mask[i / 8];
#pragma unroll
    for (int k = 0; k < 8; ++k) v.v[k] = (bits >> k) & 1 ? v.v[k] : Acc<X>(0);
    store_octet<packed>(y + i, count, v.v);
  }
}

template <class X, class Y>
void launch_octets(const char* name, void (*packed)(int64_t, const X*, Y*, uint8_t*), void (*scalar)(int64_t, const X*, Y*, uint8_t*),
                   int64_t n, const X* x, Y* y, uint8_t* mask) {
  if (n == 0) return;
  const bool pieces = aligned(x, 8 * sizeof(X)) && aligned(y, 8 * sizeof(Y));
  launch(name, pieces ? packed : scalar, grid_for(n, 8 * kMapThreads, kMapBlocks), kMapThreads, 0, n, x, y, mask);
}

}  // namespace

void relu(const Tensor& x, const Tensor& y) { map("relu", Relu{}, x, y); }

void relu_mask(const Tensor& x, const Tensor& y, const Tensor& mask) {
  check_alike(x, y, "relu_mask");
  check_mask(mask, x);
  dispatch(x.dtype(), y.dtype(), [&](auto tx, auto ty) {
    launch_octets("relu_mask", &relu_mask_kernel<true, decltype(tx), decltype(ty)>, &relu_mask_kernel<false, decltype(tx), decltype(ty)>,
                  y.numel(), x.data<decltype(tx)>(), y.data<decltype(ty)>(), mask.data<uint8_t>());
  });
}

void apply_mask(const Tensor& x, const Tensor& mask, const Tensor& y) {
  check_alike(x, y, "apply_mask");
  check_mask(mask, x);
  dispatch(x.dtype(), y.dtype(), [&](auto tx, auto ty) {
    launch_octets("apply_mask", &apply_mask_kernel<true, decltype(tx), decltype(ty)>, &apply_mask_kernel<false, decltype(tx), decltype(ty)>,
                  y.numel(), x.data<decltype(tx)>(), y.data<decltype(ty)>(), mask.data<uint8_t>());
  });
}

void gelu(const Tensor& x, const Tensor& y) { map("gelu", Gelu{}, x, y); }

void gelu_grad(const Tensor& dy, const Tensor& x, const Tensor& dx, const Tensor& y) {
  if (!y.defined()) return map("gelu_grad", GeluGrad{}, dy, x, dx);
  for (const Tensor& t : {x, dx, y}) check_alike(dy, t, "gelu_grad");
  if (dy.dtype() != x.dtype() || dx.dtype() != x.dtype() || y.dtype() != x.dtype()) {  // only has to be right
    gelu_grad(dy, x, dx, Tensor());
    return gelu(x, y);
  }
  const int64_t n = x.numel();
  if (n == 0) return;
  const auto run = [&](auto type) {
    using T = decltype(type);
    constexpr int N = kLaneElements<T>;
    bool packed = true;
    for (const Tensor& t : {dy, x, dx, y}) packed = packed && aligned(t.raw(), N * sizeof(T));
    launch("gelu_grad", packed ? &gelu_grad_and_value<N, T> : &gelu_grad_and_value<1, T>,
           grid_for(n, (packed ? N : 1) * kMapThreads, kMapBlocks), kMapThreads, 0, n, dy.data<T>(), x.data<T>(), dx.data<T>(),
           y.data<T>());
  };
  if (x.dtype() == DType::f64)
    run(double{});
  else
    dispatch_narrow(x.dtype(), run);
}

}  // namespace mesa::kernels::cuda
