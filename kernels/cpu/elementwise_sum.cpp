// db[n] = sum_m dy[m, n];  sum_i x[i]^2;  the first i where x[i] is not finite.
// Sums are made in chunks of fixed size and the chunks' sums added in order: the result does not depend on the number of threads.
#include <vector>

#include "mesa/kernels/elementwise.h"

#include "cpu.h"

namespace mesa::kernels::MESA_ISA {

namespace {

constexpr int64_t kSumRows = 64;       // rows a chunk: fp32 sums this short keep their relative error near 1e-7
constexpr int64_t kSumElements = 8192;

/// sum[n] = sum over rows begin..end-1 of x[row, n]; four rows at a time, since the sums travel to memory and back.
template <class T>
void sum_chunk(const T* x, int64_t begin, int64_t end, int64_t width, Acc<T>* sum) {
  std::fill(sum, sum + width, Acc<T>(0));
  int64_t row = begin;
  for (; row + 4 <= end; row += 4) {
    const T *x0 = x + row * width, *x1 = x0 + width, *x2 = x1 + width, *x3 = x2 + width;
#pragma omp simd
    for (int64_t n = 0; n < width; ++n) sum[n] += (load(x0 + n) + load(x1 + n)) + (load(x2 + n) + load(x3 + n));
  }
  for (; row < end; ++row) {
    const T* x0 = x + row * width;
#pragma omp simd
    for (int64_t n = 0; n < width; ++n) sum[n] += load(x0 + n);
  }
}

// The loops below stand in functions of their own: gcc does not vectorize a reduction that reads its bounds from a closure.

template <class T>
double sum_of_squares(const T* x, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const double value = load(x + i);
    sum += value * value;
  }
  return sum;
}

/// x - x is 0 for finite x and NaN otherwise, and so is the sum.
template <class T>
bool all_finite(const T* x, int64_t n) {
  Acc<T> sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += load(x + i) - load(x + i);
  return sum == 0;
}

}  // namespace

void sum_rows(const Tensor& dy, const Tensor& db, bool accumulate) {
  check_flat(dy, "sum_rows: dy");
  check_flat(db, "sum_rows: db");
  const int64_t width = db.numel();
  if (width == 0) return;
  check(dy.numel() % width == 0, "sum_rows: ", width, " elements do not divide a tensor of shape ", dy.shape());
  const int64_t rows = dy.numel() / width, chunks = (rows + kSumRows - 1) / kSumRows;
  dispatch_float(dy.dtype(), [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const T* x = dy.data<T>();
    const Tensor partial = Tensor::empty({chunks, width}, dtype_of<A>);
    A* sums = partial.data<A>();
    parallel_chunks(rows, kSumRows, width,
                    [=](int64_t c, int64_t begin, int64_t end) { sum_chunk(x, begin, end, width, sums + c * width); });
    dispatch_wide(db.dtype(), [&](auto out) { add_partials(sums, chunks, width, width, db.data<decltype(out)>(), accumulate); });
  });
}

void sum_squares(const std::vector<Tensor>& xs, const Tensor& result) {
  double total = 0;
  for (const Tensor& x : xs) {
    check_flat(x, "sum_squares: x");
    std::vector<double> partial((x.numel() + kSumElements - 1) / kSumElements);
    dispatch_float(x.dtype(), [&](auto tag) {
      const auto* px = x.data<decltype(tag)>();
      double* sums = partial.data();
      parallel_chunks(x.numel(), kSumElements, 1,
                      [=](int64_t c, int64_t begin, int64_t end) { sums[c] = sum_of_squares(px + begin, end - begin); });
    });
    double sum = 0;
    for (double part : partial) sum += part;
    total += sum;
  }
  *result.data<double>() = total;
}

void count_nonfinite(const Tensor& x, const Tensor& counts) {
  check_flat(x, "count_nonfinite: x");
  std::vector<int64_t> found((x.numel() + kSumElements - 1) / kSumElements, 0);
  dispatch_float(x.dtype(), [&](auto tag) {
    const auto* px = x.data<decltype(tag)>();
    int64_t* out = found.data();
    parallel_chunks(x.numel(), kSumElements, 1, [=](int64_t c, int64_t begin, int64_t end) {
      if (all_finite(px + begin, end - begin)) return;
      for (int64_t i = begin; i < end; ++i) out[c] += !all_finite(px + i, 1);
    });
  });
  if (!counts.defined()) return;
  for (int64_t count : found) counts.data<int64_t>()[1] += count;
}

void first_nonfinite(const Tensor& x, int64_t* result) {
  check_flat(x, "first_nonfinite: x");
  const int64_t chunks = (x.numel() + kSumElements - 1) / kSumElements;
  std::vector<int64_t> found(chunks, -1);
  dispatch_float(x.dtype(), [&](auto tag) {
    using T = decltype(tag);
    const T* px = x.data<T>();
    int64_t* out = found.data();
    parallel_chunks(x.numel(), kSumElements, 1, [=](int64_t c, int64_t begin, int64_t end) {
      if (all_finite(px + begin, end - begin)) return;
      for (int64_t i = begin; out[c] < 0; ++i)
        if (!all_finite(px + i, 1)) out[c] = i;
    });
  });
  *result = -1;
  for (int64_t index : found)
    if (index >= 0) {
      *result = index;
      break;
    }
}

}  // namespace mesa::kernels::MESA_ISA
