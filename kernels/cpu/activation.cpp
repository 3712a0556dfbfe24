// relu(x) = max(x, 0), dx = dy where the bit !(x <= 0) is set;  gelu(x) = x Phi(x), gelu'(x) = Phi(x) + x phi(x) with the exact normal
// distribution.
#include "cpu.h"
#include "mesa/kernels/elementwise.h"

namespace mesa::kernels::MESA_ISA {

namespace {

template <class F>
void map(const Tensor& x, const Tensor& y, const char* name, const F& f) {
  check_alike(x, y, name);
  dispatch(x.dtype(), y.dtype(), [&](auto tx, auto ty) {
    const auto* px = x.data<decltype(tx)>();
    auto* py = y.data<decltype(ty)>();
    parallel_elements(y.numel(), [=](int64_t begin, int64_t end) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) store(py + i, f(load(px + i)));
    });
  });
}

/// dx[i] = f(dy[i], x[i]).
template <class F>
void map_grad(const Tensor& dy, const Tensor& x, const Tensor& dx, const char* name, const F& f) {
  check_alike(dy, x, name);
  check_alike(dy, dx, name);
  dispatch(dy.dtype(), x.dtype(), dx.dtype(), [&](auto t_dy, auto tx, auto t_dx) {
    const auto* pdy = dy.data<decltype(t_dy)>();
    const auto* px = x.data<decltype(tx)>();
    auto* pdx = dx.data<decltype(t_dx)>();
    parallel_elements(dx.numel(), [=](int64_t begin, int64_t end) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) store(pdx + i, f(load(pdy + i), load(px + i)));
    });
  });
}

/// f(i, count) for every 8 elements that share a byte of a mask; `count` is the constant 8 but for the last.
template <class F>
void for_octets(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + 8 <= end; i += 8) f(i, 8);
  if (i < end) f(i, static_cast<int>(end - i));
}

}  // namespace

void relu(const Tensor& x, const Tensor& y) {
  map(x, y, "relu", [](auto v) { return scalar::relu(v); });
}

void relu_mask(const Tensor& x, const Tensor& y, const Tensor& mask) {
  check_alike(x, y, "relu_mask");
  check_mask(mask, x);
  dispatch(x.dtype(), y.dtype(), [&](auto tx, auto ty) {
    const auto* px = x.data<decltype(tx)>();
    auto* py = y.data<decltype(ty)>();
    uint8_t* pm = mask.data<uint8_t>();
    parallel_elements(y.numel(), [=](int64_t begin, int64_t end) {  // of whole bytes
      for_octets(begin, end, [=](int64_t i, int count) {
        unsigned bits = 0;
        for (int k = 0; k < count; ++k) {
          const auto v = load(px + i + k);
          bits |= static_cast<unsigned>(scalar::relu_passes(v)) << k;
          store(py + i + k, scalar::relu(v));
        }
        pm[i / 8] = static_cast<uint8_t>(bits);
      });
    });
  });
}

void apply_mask(const Tensor& x, const Tensor& mask, const Tensor& y) {
  check_alike(x, y, "apply_mask");
  check_mask(mask, x);
  dispatch(x.dtype(), y.dtype(), [&](auto tx, auto ty) {
    const auto* px = x.data<decltype(tx)>();
    auto* py = y.data<decltype(ty)>();
    const uint8_t* pm = mask.data<uint8_t>();
    parallel_elements(y.numel(), [=](int64_t begin, int64_t end) {
      for_octets(begin, end, [=](int64_t i, int count) {
        const unsigned bits = pm[i / 8];
        for (int k = 0; k < count; ++k) {
          const auto v = load(px + i + k);
          store(py + i + k, (bits >> k) & 1 ? v : decltype(v)(0));
        }
      });
    });
  });
}

void gelu(const Tensor& x, const Tensor& y) {
  map(x, y, "gelu", [](auto v) { return scalar::gelu(v); });
}

void gelu_grad(const Tensor& dy, const Tensor& x, const Tensor& dx, const Tensor& y) {
  if (!y.defined()) return map_grad(dy, x, dx, "gelu_grad", [](auto g, auto v) { return g * scalar::gelu_slope(v); });
  for (const Tensor& t : {x, dx, y}) check_alike(dy, t, "gelu_grad");
  if (dy.dtype() != x.dtype() || dx.dtype() != x.dtype() || y.dtype() != x.dtype()) {  // only has to be right
    gelu_grad(dy, x, dx, Tensor());
    return gelu(x, y);
  }
  const auto run = [&](auto type) {
    using T = decltype(type);
    const T *pdy = dy.data<T>(), *px = x.data<T>();
    T *pdx = dx.data<T>(), *py = y.data<T>();
    parallel_elements(y.numel(), [=](int64_t begin, int64_t end) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) {
        const auto v = load(px + i);
        store(pdx + i, load(pdy + i) * scalar::gelu_slope(v));
        store(py + i, scalar::gelu(v));
      }
    });
  };
  if (x.dtype() == DType::f64)
    run(double{});
  else
    dispatch_narrow(x.dtype(), run);
}

}  // namespace mesa::kernels::MESA_ISA
