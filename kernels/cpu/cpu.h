// What the CPU kernels share: loads and stores of any floating dtype, parallel loops, blocks of random numbers.
// Everything stands in an anonymous namespace: the same names compiled for several instruction sets must not be merged by the linker.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "mesa/base/random.h"
#include "mesa/kernels/common.h"
#include "mesa/kernels/scalar.h"

namespace mesa::kernels::MESA_ISA {
namespace {

template <class T>
[[gnu::always_inline]] inline Acc<T> load(const T* p) {
  if constexpr (std::is_same_v<T, bf16>)
    return scalar::float_of(static_cast<uint32_t>(p->bits) << 16);
  else
    return *p;
}
template <class T, class V>
[[gnu::always_inline]] inline void store(T* p, V value) {
  if constexpr (std::is_same_v<T, bf16>) {
    const float x = static_cast<float>(value);  // bf16(float), spelled so that loops around it vectorize
    const uint32_t u = scalar::bits_of(x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const uint32_t quiet = (u >> 16) | 0x40u;
    p->bits = static_cast<uint16_t>(x != x ? quiet : rounded);
  } else {
    *p = static_cast<T>(value);
  }
}

/// gamma xhat + beta, one spelling for the norms and affine: all must contract it to the same instruction.
template <class A>
[[gnu::always_inline]] inline A affine_of(A xhat, A gamma, A beta) {
  return gamma * xhat + beta;
}

// --- parallel loops -------------------------------------------------------------------------------------------------------------

/// Below this many elements a fork of threads costs more than it saves.
inline constexpr int64_t kForkElements = 16384;
inline bool worth_forking(int64_t elements) { return elements >= kForkElements && omp_get_max_threads() > 1 && !omp_in_parallel(); }

/// f(begin, end) over element ranges whose bounds are multiples of 64: vectors and cache lines fall alike for every thread count.
template <class F>
void parallel_elements(int64_t n, const F& f) {
  if (!worth_forking(n)) {
    if (n > 0) f(int64_t{0}, n);
    return;
  }
  const int64_t blocks = (n + 63) / 64;
#pragma omp parallel
  {
    const int64_t t = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t begin = blocks * t / threads * 64, end = std::min(n, blocks * (t + 1) / threads * 64);
    if (begin < end) f(begin, end);
  }
}

/// f(row, begin, end) over the elements of rows of `width`: several threads may share a row, so that few long ones occupy all.
template <class F>
void parallel_within_rows(int64_t rows, int64_t width, const F& f) {
  parallel_elements(rows * width, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const int64_t row = at / width, stop = std::min(end, (row + 1) * width);
      f(row, at, stop);
      at = stop;
    }
  });
}

/// f(begin, end) over ranges of rows, each row `width` elements of work.
template <class F>
void parallel_rows(int64_t rows, int64_t width, const F& f) {
  if (!worth_forking(rows * width)) {
    if (rows > 0) f(int64_t{0}, rows);
    return;
  }
#pragma omp parallel
  {
    const int64_t t = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t begin = rows * t / threads, end = rows * (t + 1) / threads;
    if (begin < end) f(begin, end);
  }
}

/// f(chunk, begin, end) for each chunk of `size` items of n: the chunks, and so the sums made in them, do not depend on the threads.
template <class F>
void parallel_chunks(int64_t n, int64_t size, int64_t width, const F& f) {
  const int64_t chunks = (n + size - 1) / size;
  parallel_rows(chunks, size * width, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) f(c, c * size, std::min(n, (c + 1) * size));
  });
}

/// out[n] <- (accumulate ? out[n] : 0) + sum_c partial[c * stride + n], in the order of c, in double.
template <class A, class Out>
void add_partials(const A* partial, int64_t chunks, int64_t stride, int64_t width, Out* out, bool accumulate) {
  parallel_chunks(width, 64, chunks, [=](int64_t, int64_t begin, int64_t end) {
    double sum[64];
    for (int64_t n = begin; n < end; ++n) sum[n - begin] = accumulate ? static_cast<double>(out[n]) : 0.0;
    for (int64_t c = 0; c < chunks; ++c) {
      const A* row = partial + c * stride;
#pragma omp simd
      for (int64_t n = begin; n < end; ++n) sum[n - begin] += row[n];
    }
    for (int64_t n = begin; n < end; ++n) out[n] = static_cast<Out>(sum[n - begin]);
  });
}

// --- reductions of one row ------------------------------------------------------------------------------------------------------
// Functions of plain arguments, not lambdas: gcc does not vectorize a reduction that reads its bounds from a closure.

/// sum_i a[i] b[i].
template <class S, class T, class U>
S dot(const T* a, const U* b, int64_t n) {
  S sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += load(a + i) * load(b + i);
  return sum;
}

/// The largest element; a NaN may be passed over (it comes back in the exponentials' sum).
template <class T>
Acc<T> max_of(const T* x, int64_t n) {
  Acc<T> top = load(x);
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; ++i) top = load(x + i) > top ? load(x + i) : top;
  return top;
}

inline constexpr int kLanes = 16;  // one 512-bit vector of floats

template <class T>
[[gnu::always_inline]] inline void exponential_lanes(const T* x, Acc<T> scale, Acc<T> shift, Acc<T>* e, Acc<T>* sum) {
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) {
    const Acc<T> value = scalar::exp_nonpositive(scale * load(x + l) - shift);
    e[l] = value;
    sum[l] += value;
  }
}

/// e[i] = exp(scale x[i] - shift) where shift is the largest scale x[i], scale > 0; returns their sum. e may be x.
/// The last few elements go through a padded vector: one by one they would cost as much as all the others in a short row.
template <class T>
Acc<T> exponentials(const T* x, int64_t n, Acc<T> scale, Acc<T> shift, Acc<T>* e) {
  using A = Acc<T>;
  A sum[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) exponential_lanes(x + i, scale, shift, e + i, sum);
  if (i < n) {
    A last[kLanes], values[kLanes];
    for (int l = 0; l < kLanes; ++l) last[l] = i + l < n ? load(x + i + l) : -std::numeric_limits<A>::infinity();
    exponential_lanes(last, scale, shift, values, sum);
    for (int l = 0; i + l < n; ++l) e[i + l] = values[l];
  }
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) sum[l] += sum[l + half];
  return sum[0];
}

// --- random numbers -------------------------------------------------------------------------------------------------------------

inline constexpr int kRandomBlock = 64;  // words from 16 counters: one vector of each Philox lane

/// words[4 j + k] = word k of counter + j: the words of elements 4 counter .. 4 counter + 63 of the stream.
inline void random_block(RandomKey key, uint64_t counter, uint32_t* words) {
#pragma omp simd
  for (int j = 0; j < kRandomBlock / 4; ++j) {
    const uint64_t c = counter + static_cast<uint64_t>(j);
    uint64_t c0 = c & 0xffffffffu, c1 = c >> 32, c2 = key.step & 0xffffffffu, c3 = key.step >> 32;  // 32-bit values in 64-bit lanes:
    uint64_t k0 = key.key & 0xffffffffu, k1 = key.key >> 32;                                        // products need no shuffles
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = c0 * 0xD2511F53u, p1 = c2 * 0xCD9E8D57u;
      c0 = (p1 >> 32) ^ c1 ^ k0;
      c2 = (p0 >> 32) ^ c3 ^ k1;
      c1 = p1 & 0xffffffffu;
      c3 = p0 & 0xffffffffu;
      k0 = (k0 + 0x9E3779B9u) & 0xffffffffu;
      k1 = (k1 + 0xBB67AE85u) & 0xffffffffu;
    }
    words[4 * j] = static_cast<uint32_t>(c0);
    words[4 * j + 1] = static_cast<uint32_t>(c1);
    words[4 * j + 2] = static_cast<uint32_t>(c2);
    words[4 * j + 3] = static_cast<uint32_t>(c3);
  }
}

}  // namespace
}  // namespace mesa::kernels::MESA_ISA
