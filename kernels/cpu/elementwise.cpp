// y = value, y = a + b, y = a b, y = s x, y[m, n] = a[m, n] + b[n], y[m, n] = s[m] x[m, n].
#include "mesa/kernels/elementwise.h"

#include "cpu.h"

namespace mesa::kernels::MESA_ISA {

namespace {

/// y[i] = f(a[i], b[i]) in the accumulation type. In place is fine: an element is read before its own place is written.
template <class F>
void map_pairs(const Tensor& a, const Tensor& b, const Tensor& y, const char* name, const F& f) {
  check_alike(a, b, name);
  check_alike(a, y, name);
  dispatch(a.dtype(), b.dtype(), y.dtype(), [&](auto ta, auto tb, auto ty) {
    const auto* pa = a.data<decltype(ta)>();
    const auto* pb = b.data<decltype(tb)>();
    auto* py = y.data<decltype(ty)>();
    parallel_elements(y.numel(), [=](int64_t begin, int64_t end) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) store(py + i, f(load(pa + i), load(pb + i)));
    });
  });
}

}  // namespace

void fill(const Tensor& y, double value) {
  check_flat(y, "fill: y");
  dispatch_float(y.dtype(), [&](auto tag) {
    using T = decltype(tag);
    T* py = y.data<T>();
    T filler;
    store(&filler, value);
    parallel_elements(y.numel(), [=](int64_t begin, int64_t end) { std::fill(py + begin, py + end, filler); });
  });
}

void add(const Tensor& a, const Tensor& b, const Tensor& y) {
  map_pairs(a, b, y, "add", [](auto u, auto v) { return u + v; });
}

void mul(const Tensor& a, const Tensor& b, const Tensor& y) {
  map_pairs(a, b, y, "mul", [](auto u, auto v) { return u * v; });
}

void scale_rows(const Tensor& x, const Tensor& s, const Tensor& y) {
  check_alike(x, y, "scale_rows");
  check(s.is_contiguous() && s.numel() == x.rows(), "scale_rows: ", s.numel(), " factors for ", x.rows(), " rows");
  dispatch(x.dtype(), y.dtype(), [&](auto tx, auto ty) {
    using A = Acc<decltype(tx)>;
    const auto* px = x.data<decltype(tx)>();
    const A* ps = s.data<A>();
    auto* py = y.data<decltype(ty)>();
    parallel_within_rows(x.rows(), width_of(x), [=](int64_t row, int64_t begin, int64_t end) {
      const A factor = ps[row];
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) store(py + i, factor * load(px + i));
    });
  });
}

void scale(const Tensor& x, double s, const Tensor& y) {
  check_alike(x, y, "scale");
  dispatch(x.dtype(), y.dtype(), [&](auto tx, auto ty) {
    using A = Acc<decltype(tx)>;
    const auto* px = x.data<decltype(tx)>();
    auto* py = y.data<decltype(ty)>();
    const A factor = static_cast<A>(s);
    parallel_elements(y.numel(), [=](int64_t begin, int64_t end) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) store(py + i, factor * load(px + i));
    });
  });
}

void add_rows(const Tensor& a, const Tensor& b, const Tensor& y) {
  check_alike(a, y, "add_rows");
  check_flat(b, "add_rows: b");
  if (a.numel() == 0) return;
  const int64_t width = b.numel();
  check(width > 0 && a.numel() % width == 0, "add_rows: ", width, " elements do not divide a tensor of shape ", a.shape());
  dispatch(a.dtype(), b.dtype(), y.dtype(), [&](auto ta, auto tb, auto ty) {
    const auto* pa = a.data<decltype(ta)>();
    const auto* pb = b.data<decltype(tb)>();
    auto* py = y.data<decltype(ty)>();
    parallel_elements(y.numel(), [=](int64_t begin, int64_t end) {  // a range may begin and end inside a row
      for (int64_t at = begin; at < end;) {
        const int64_t column = at % width, count = std::min(end - at, width - column);
        const auto* qa = pa + at;
        const auto* qb = pb + column;
        auto* qy = py + at;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) store(qy + i, load(qa + i) + load(qb + i));
        at += count;
      }
    });
  });
}

}  // namespace mesa::kernels::MESA_ISA
