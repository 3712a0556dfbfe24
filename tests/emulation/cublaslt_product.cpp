#include "cublaslt_product.h"

#include <algorithm>
#include <vector>

#include "mesa/base/device.h"
#include "mesa/base/dtype.h"

namespace mesa::emulation {
namespace {

template <class F>
void dispatch(cudaDataType type, F&& f) {
  switch (type) {
    case CUDA_R_16BF: return f(bf16{});
    case CUDA_R_64F: return f(double{});
    default: return f(float{});
  }
}

// --- c [m, n] <- a [m, k] b [k, n], all contiguous --------------------------------------------------------------------------------

template <class T>
constexpr int64_t kStrip = 128 / sizeof(T);  // columns of b that a row of c takes at a time: their sums stay in registers

/// b as strips of columns, each contiguous, the last filled up with zeros.
template <class T>
std::vector<T> in_strips(const T* b, int64_t k, int64_t n) {
  std::vector<T> out(static_cast<size_t>((n + kStrip<T> - 1) / kStrip<T> * k * kStrip<T>));
  T* to = out.data();
  for (int64_t j = 0; j < n; j += kStrip<T>)
    for (int64_t l = 0; l < k; ++l, to += kStrip<T>) std::copy_n(b + l * n + j, std::min(kStrip<T>, n - j), to);
  return out;
}

/// kRows rows of c.
template <int kRows, class T>
[[gnu::always_inline]] inline void rows_of_c(const T* a, const T* strip, T* c, int64_t k, int64_t n) {
  for (int64_t j = 0; j < n; j += kStrip<T>, strip += k * kStrip<T>) {
    T sums[kRows][kStrip<T>] = {};
    for (int64_t l = 0; l < k; ++l)
      for (int r = 0; r < kRows; ++r)
        for (int64_t s = 0; s < kStrip<T>; ++s) sums[r][s] += a[r * k + l] * strip[l * kStrip<T> + s];
    for (int r = 0; r < kRows; ++r) std::copy_n(sums[r], std::min(kStrip<T>, n - j), c + r * n + j);
  }
}
template <class T>
[[gnu::always_inline]] inline void panel(const T* a, const T* strips, T* c, int64_t rows, int64_t k, int64_t n) {
  if (rows == 4) return rows_of_c<4>(a, strips, c, k, n);
  for (int64_t r = 0; r < rows; ++r) rows_of_c<1>(a + r * k, strips, c + r * n, k, n);
}

void panel_of(const double* a, const double* strips, double* c, int64_t rows, int64_t k, int64_t n) { panel(a, strips, c, rows, k, n); }
void panel_plain(const float* a, const float* strips, float* c, int64_t rows, int64_t k, int64_t n) { panel(a, strips, c, rows, k, n); }
#ifdef __x86_64__
[[gnu::target("avx2,fma")]] void panel_avx2(const float* a, const float* strips, float* c, int64_t rows, int64_t k, int64_t n) {
  panel(a, strips, c, rows, k, n);
}
[[gnu::target("avx512f,avx2,fma")]] void panel_avx512(const float* a, const float* strips, float* c, int64_t rows, int64_t k, int64_t n) {
  panel(a, strips, c, rows, k, n);
}
#endif
void panel_of(const float* a, const float* strips, float* c, int64_t rows, int64_t k, int64_t n) {
#ifdef __x86_64__
  if (cpu_isa() == Isa::avx512) return panel_avx512(a, strips, c, rows, k, n);
  if (cpu_isa() == Isa::avx2) return panel_avx2(a, strips, c, rows, k, n);
#endif
  panel_plain(a, strips, c, rows, k, n);
}

constexpr int64_t kWorthThreads = 1 << 20;  // multiplications; below that threads cost more than they save

template <class T>
void multiply(const T* a, const T* b, T* c, int64_t m, int64_t k, int64_t n) {
  const std::vector<T> strips = in_strips(b, k, n);
#pragma omp parallel for if (m * k * n > kWorthThreads)
  for (int64_t i = 0; i < m; i += 4) panel_of(a + i * k, strips.data(), c + i * n, std::min<int64_t>(4, m - i), k, n);
}

// --- one matrix of a batch --------------------------------------------------------------------------------------------------------

/// f(i, j) for every element, tile by tile: one side of a copy may go down columns and the other along rows.
template <class F>
void for_tiles(int64_t rows, int64_t columns, F&& f) {
  constexpr int64_t kTile = 16;
  for (int64_t top = 0; top < rows; top += kTile)
    for (int64_t left = 0; left < columns; left += kTile)
      for (int64_t i = top; i < std::min(rows, top + kTile); ++i)
        for (int64_t j = left; j < std::min(columns, left + kTile); ++j) f(i, j);
}

/// op(matrix) as a contiguous [rows, columns].
template <class T>
std::vector<T> packed(const Layout& layout, const void* data, int64_t batch, bool transposed) {
  const int64_t rows = static_cast<int64_t>(transposed ? layout.columns : layout.rows);
  const int64_t columns = static_cast<int64_t>(transposed ? layout.rows : layout.columns);
  std::vector<T> out(static_cast<size_t>(rows * columns));
  dispatch(layout.type, [&](auto tag) {
    const auto* from = static_cast<const decltype(tag)*>(data);
    for_tiles(rows, columns, [&](int64_t i, int64_t j) {
      out[static_cast<size_t>(i * columns + j)] = static_cast<T>(from[transposed ? layout.at(batch, j, i) : layout.at(batch, i, j)]);
    });
  });
  return out;
}

/// out[i] <- the sum of line i of x, whose elements stand `step` apart in lines `line` apart.
template <class T>
void sum_lines(const std::vector<T>& x, int64_t lines, int64_t line, int64_t length, int64_t step, cudaDataType type, void* out) {
  dispatch(type, [&](auto tag) {
    using S = decltype(tag);
    for (int64_t i = 0; i < lines; ++i) {
      T sum = 0;
      for (int64_t j = 0; j < length; ++j) sum += x[static_cast<size_t>(i * line + j * step)];
      static_cast<S*>(out)[i] = static_cast<S>(sum);
    }
  });
}

template <class T>
void store(const Product& p, int64_t batch, const std::vector<T>& sums) {
  const T alpha = static_cast<T>(p.alpha), beta = static_cast<T>(p.beta);
  std::vector<T> addend;  // C, if it counts
  if (p.beta != 0) addend = packed<T>(p.c, p.c_data, batch, false);
  std::vector<T> bias(static_cast<size_t>(p.m()), T{0});
  if (p.epilogue == Epilogue::bias)
    dispatch(p.vector_type, [&](auto tag) {
      const auto* from = static_cast<const decltype(tag)*>(p.vector) + batch * p.vector_distance;
      for (int64_t i = 0; i < p.m(); ++i) bias[static_cast<size_t>(i)] = static_cast<T>(from[i]);
    });
  dispatch(p.d.type, [&](auto tag) {
    using S = decltype(tag);
    S* const out = static_cast<S*>(p.d_data);
    for_tiles(p.m(), p.n(), [&](int64_t i, int64_t j) {
      const size_t at = static_cast<size_t>(i * p.n() + j);
      const T value = alpha * sums[at] + (p.beta != 0 ? beta * addend[at] : T{0}) + bias[static_cast<size_t>(i)];
      out[p.d.at(batch, i, j)] = static_cast<S>(value);
    });
  });
}

template <class T>
void multiply_one(const Product& p, int64_t batch) {
  const std::vector<T> a = packed<T>(p.a, p.a_data, batch, p.transposed_a), b = packed<T>(p.b, p.b_data, batch, p.transposed_b);
  std::vector<T> sums(static_cast<size_t>(p.m() * p.n()));
  multiply(a.data(), b.data(), sums.data(), p.m(), p.k(), p.n());
  store(p, batch, sums);
  if (p.epilogue == Epilogue::sums_of_a) sum_lines(a, p.m(), p.k(), p.k(), 1, p.vector_type, p.vector);
  if (p.epilogue == Epilogue::sums_of_b) sum_lines(b, p.n(), 1, p.k(), p.n(), p.vector_type, p.vector);
}

template <class F>
void for_each_element(const Layout& layout, F&& f) {
  for (int64_t batch = 0; batch < layout.batches; ++batch)
    for (int64_t i = 0; i < static_cast<int64_t>(layout.rows); ++i)
      for (int64_t j = 0; j < static_cast<int64_t>(layout.columns); ++j) f(layout.at(batch, i, j));
}

}  // namespace

size_t size_of(cudaDataType type) { return type == CUDA_R_16BF ? 2 : type == CUDA_R_64F ? 8 : 4; }

void multiply(const Product& p) {
#pragma omp parallel for if (p.d.batches > 1 && p.d.batches * p.m() * p.n() * p.k() > kWorthThreads)
  for (int64_t batch = 0; batch < p.d.batches; ++batch)
    p.d.type == CUDA_R_64F ? multiply_one<double>(p, batch) : multiply_one<float>(p, batch);
}

bool overlap(const Layout& x, const void* x_data, const Layout& y, const void* y_data) {
  const auto ends = [](const Layout& layout, const void* data) {
    const int64_t last = layout.at(layout.batches - 1, static_cast<int64_t>(layout.rows) - 1, static_cast<int64_t>(layout.columns) - 1);
    const auto* first = static_cast<const char*>(data);
    return std::pair(first, first + (last + 1) * static_cast<int64_t>(size_of(layout.type)));
  };
  const auto [x_begin, x_end] = ends(x, x_data);
  const auto [y_begin, y_end] = ends(y, y_data);
  if (x_end <= y_begin || y_end <= x_begin) return false;
  // The ranges do; matrices within one buffer may still lie between each other's rows.
  std::vector<bool> taken(static_cast<size_t>(x_end - x_begin));
  const int64_t x_bytes = static_cast<int64_t>(size_of(x.type)), y_bytes = static_cast<int64_t>(size_of(y.type));
  for_each_element(x, [&](int64_t at) { std::fill_n(taken.begin() + at * x_bytes, x_bytes, true); });
  const auto is_taken = [&, begin = x_begin, end = x_end](const char* byte) {
    return byte >= begin && byte < end && taken[static_cast<size_t>(byte - begin)];
  };
  bool found = false;
  for_each_element(y, [&, begin = y_begin](int64_t at) {
    const char* const first = begin + at * y_bytes;
    found = found || is_taken(first) || is_taken(first + y_bytes - 1);
  });
  return found;
}

}  // namespace mesa::emulation
