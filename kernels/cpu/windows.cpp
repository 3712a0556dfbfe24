// Windows of a grid as rows that lie together, and back; scale s + bias by relative position, and the sum of gradients for each distance.
#include "mesa/kernels/windows.h"

#include "cpu.h"
#include "mesa/kernels/windows_common.h"

namespace mesa::kernels::MESA_ISA {

namespace {

/// f(row of the grid, row of the windows) for each token.
template <class F>
void for_tokens(const Tensor& grid, const Tensor& windowed, const Windows& w, int64_t first, const char* name, const F& f) {
  check_windowed(grid, windowed, w, first, name);
  const int64_t n = w.length(), count = w.count(), tokens = w.tokens();
  parallel_rows(windowed.dim(0) * n, grid.dim(2), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t window = first + row / n;
      f(window / count * tokens + w.token(static_cast<int>(window % count), static_cast<int>(row % n)), row);
    }
  });
}

template <class T>
void copy_row(const T* x, T* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = x[i];
}

/// scale s + bias, without those of other regions than `own`.
template <class S, class Y, class A>
void add_row(const S* s, A scale, const A* bias, const int* regions, int own, Y* y, int64_t n) {
  if (regions == nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) store(y + j, scale * load(s + j) + bias[j]);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) store(y + j, regions[j] == own ? scale * load(s + j) + bias[j] : A(kHidden));
  }
}

}  // namespace

void gather_windows(const Tensor& x, const Windows& windows, int64_t first, const Tensor& y) {
  dispatch_float(x.dtype(), [&](auto tag) {
    using T = decltype(tag);
    const Rows<T> in = rows_of<T>(x);
    T* out = y.data<T>();
    for_tokens(x, y, windows, first, "gather_windows",
               [=, C = x.dim(2)](int64_t from, int64_t to) { copy_row(in[from], out + to * C, C); });
  });
}

void scatter_windows(const Tensor& y, const Windows& windows, int64_t first, const Tensor& x) {
  dispatch_float(x.dtype(), [&](auto tag) {
    using T = decltype(tag);
    const Rows<T> out = rows_of<T>(x);
    const T* in = y.data<T>();
    for_tokens(x, y, windows, first, "scatter_windows",
               [=, C = x.dim(2)](int64_t to, int64_t from) { copy_row(in + from * C, out[to], C); });
  });
}

void expand_bias(const Tensor& table, const Windows& w, const Tensor& bias) {
  check_bias(table, w, bias, "expand_bias");
  const int64_t n = w.length(), heads = bias.dim(0);
  dispatch_wide(table.dtype(), [&](auto tag) {
    using A = decltype(tag);
    const A* in = table.data<A>();
    A* out = bias.data<A>();
    parallel_rows(heads * n, n, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t h = row / n, from = w.position(static_cast<int>(row % n)) + w.origin();
        for (int64_t u = 0; u < n; ++u) out[row * n + u] = in[(from - w.position(static_cast<int>(u))) * heads + h];
      }
    });
  });
}

void expand_bias_grad(const Tensor& dbias, const Windows& w, double factor, const Tensor& dtable, bool accumulate) {
  check_bias(dtable, w, dbias, "expand_bias_grad");
  const int64_t heads = dbias.dim(0), n = w.length();
  dispatch_wide(dbias.dtype(), [&](auto tag) {
    using A = decltype(tag);
    const A* in = dbias.data<A>();
    A* out = dtable.data<A>();
    parallel_rows(heads * w.distances(), n, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t h = i % heads;
        double sum = 0;
        w.each_pair(static_cast<int>(i / heads), [&](int t, int u) { sum += in[(h * n + t) * n + u]; });
        out[i] = static_cast<A>(factor * sum + (accumulate ? static_cast<double>(out[i]) : 0.0));
      }
    });
  });
}

void add_window_bias(const Tensor& s, double scale, const Tensor& bias, const Windows& w, int64_t first, const Tensor& y) {
  check_scores(s, bias, w, first, y);
  const int64_t heads = bias.dim(0), n = w.length();
  dispatch(s.dtype(), y.dtype(), [&](auto ts, auto ty) {
    using A = Acc<decltype(ts)>;
    const auto* in = s.data<decltype(ts)>();
    auto* out = y.data<decltype(ty)>();
    const A* added = bias.data<A>();
    parallel_rows(s.dim(0), heads * n * n, [&](int64_t begin, int64_t end) {
      std::vector<int> regions(n);
      for (int64_t i = begin; i < end; ++i) {
        const int window = static_cast<int>((first + i) % w.count());
        const bool divided = w.divided(window);
        for (int t = 0; divided && t < n; ++t) regions[t] = w.region(window, t);
        for (int64_t r = 0; r < heads * n; ++r) {
          const int64_t at = (i * heads * n + r) * n;
          add_row(in + at, static_cast<A>(scale), added + r * n, divided ? regions.data() : nullptr, regions[r % n], out + at, n);
        }
      }
    });
  });
}

}  // namespace mesa::kernels::MESA_ISA
