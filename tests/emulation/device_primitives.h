// The twin of kernels/cuda/native/device_primitives.h for machines without a GPU: the same functions, on emulated threads.
#pragma once
#include <algorithm>
#include <cmath>
#include <tuple>

#include "device_memory.h"
#include "emulator.h"
#include "mesa/base/cuda.h"
#include "mesa/base/cuda_profile.h"
#include "mesa/base/dtype.h"

namespace mesa::kernels::cuda {

namespace emulated {
/// A kernel cannot reach the host's memory. Pointers within structs escape this.
template <class T>
void check_argument(const char* kernel, const T& argument) {
  if constexpr (std::is_pointer_v<T> && !std::is_function_v<std::remove_pointer_t<T>>)
    check(!emulation::kernel_may_use || emulation::kernel_may_use(argument), kernel,
          ": an argument points to the host's memory, or to device memory that was given back");
}
}  // namespace emulated

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Arguments&&... arguments) {
  const mesa::cuda::Timed timed(name);
  const auto work = [=, given = std::tuple<Parameters...>(static_cast<Parameters>(arguments)...)] {
    std::apply(
        [&](const auto&... argument) {
          (emulated::check_argument<Parameters>(name, argument), ...);
          emulation::run(name, grid, block, shared_bytes, [&] { kernel(argument...); });
        },
        given);
  };
  if (!emulation::record || !emulation::record(work)) work();
  if (mesa::cuda::synchronous && mesa::cuda::synchronous()) mesa::cuda::synchronize(name);
}

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulation::shared_memory());
}

namespace emulated {
/// Every lane's reduction over its group, from all lanes' values, in the order of the shuffles.
template <int width, class T, class F>
void reduce(unsigned char* deposits) {
  T values[32], next[32];
  for (int lane = 0; lane < 32; ++lane) std::memcpy(&values[lane], deposits + emulation::kDeposit * lane, sizeof(T));
  for (int distance = width / 2; distance > 0; distance /= 2) {
    for (int lane = 0; lane < 32; ++lane) next[lane] = F{}(values[lane], values[lane ^ distance]);
    std::copy(next, next + 32, values);
  }
  for (int lane = 0; lane < 32; ++lane) std::memcpy(deposits + emulation::kDeposit * lane, &values[lane], sizeof(T));
}
}  // namespace emulated
/// The lanes meet once, not once for each shuffle.
template <int width = 32, class T, class F>
T warp_reduce(T value, F) {
  static_assert(std::is_empty_v<F> && std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  const unsigned char* all = emulation::exchange(0xffffffffu, &value, sizeof value, "warp_reduce", emulated::reduce<width, T, F>);
  const unsigned group = (width == 32 ? 0xffffffffu : (1u << width % 32) - 1) << emulation::lane() / width * width;
  if ((emulation::present() & group) != group) emulation::give_up("warp_reduce of lanes that take no part in it");
  std::memcpy(&value, all + emulation::kDeposit * emulation::lane(), sizeof value);
  return value;
}

namespace emulated {
/// A GPU makes all NaNs one.
inline uint32_t bf16_bits(float x) { return x != x ? 0x7fffu : bf16(x).bits; }
}  // namespace emulated
inline uint32_t pack_bf16(float low, float high) { return emulated::bf16_bits(low) | emulated::bf16_bits(high) << 16; }

template <class Word>
void store_global(Word* p, Word word) {
  *emulation::hinted(p) = word;
}

inline void store_shared(void* p, uint4 word) { *static_cast<uint4*>(p) = word; }

inline float exp2_approx(float x) { return std::exp2(x); }

namespace emulated {
inline float half_of(uint32_t word, int which) {
  bf16 x;
  x.bits = static_cast<uint16_t>(which ? word >> 16 : word);
  return x;
}
}  // namespace emulated

inline float minimum(float a, float b) {
  if (a != a || b != b) return __builtin_nanf("");
  return a < b || (a == b && std::signbit(a)) ? a : b;
}
inline float maximum(float a, float b) { return -minimum(-a, -b); }
inline uint32_t minimum_bf16(uint32_t a, uint32_t b) {
  using emulated::half_of;
  return pack_bf16(minimum(half_of(a, 0), half_of(b, 0)), minimum(half_of(a, 1), half_of(b, 1)));
}
inline uint32_t maximum_bf16(uint32_t a, uint32_t b) {
  using emulated::half_of;
  return pack_bf16(maximum(half_of(a, 0), half_of(b, 0)), maximum(half_of(a, 1), half_of(b, 1)));
}

template <int bits>
uint32_t pack_clamped(int32_t low, int32_t high, uint32_t rest) {
  const auto clamped = [](int32_t v) { return static_cast<uint32_t>(v < 0 ? 0 : v > (1 << bits) - 1 ? (1 << bits) - 1 : v); };
  return rest << 2 * bits | clamped(high) << bits | clamped(low);
}

namespace emulated {

/// What a lane holds of a product, at its place among the deposits.
struct Fragments {
  uint32_t a[4], b[2];
  float d[4];
};

/// All lanes' products at once. Lane l has rows l / 4 and + 8 of a and d, and column l / 4 of b. a: words 0 and 1 are the two rows of
/// columns 2 (l % 4) and + 1, words 2 and 3 those 8 columns on; b: word 0 is rows 2 (l % 4) and + 1, word 1 those 8 rows on; d[i]: row + 8
/// (i / 2), column 2 (l % 4) + i % 2.
inline void multiply(unsigned char* deposits) {
  const auto of = [&](int lane) { return reinterpret_cast<Fragments*>(deposits + emulation::kDeposit * lane); };
  float a[16][16], b[16][8], d[16][8] = {};
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& f = *of(lane);
    const int line = lane / 4, at = lane % 4 * 2;
    for (int word = 0; word < 4; ++word)
      for (int i = 0; i < 2; ++i) a[line + word % 2 * 8][at + word / 2 * 8 + i] = half_of(f.a[word], i);
    for (int word = 0; word < 2; ++word)
      for (int i = 0; i < 2; ++i) b[at + word * 8 + i][line] = half_of(f.b[word], i);
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) of(lane)->d[i] += d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

}  // namespace emulated

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const emulated::Fragments mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {d[0], d[1], d[2], d[3]}};
  const unsigned char* all = emulation::exchange_warp(&mine, sizeof mine, "mma_bf16", emulated::multiply);
  std::memcpy(d, all + emulation::kDeposit * emulation::lane() + offsetof(emulated::Fragments, d), sizeof d);
}

namespace emulated {
template <bool transposed>
void ldmatrix(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulation::give_up("ldmatrix of an unaligned row");
  const unsigned char* all = emulation::exchange_warp(&row, sizeof row, transposed ? "ldmatrix_x4_transposed" : "ldmatrix_x4");
  const int lane = emulation::lane();
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) {
      const int at_row = transposed ? lane % 4 * 2 + j : lane / 4, at_column = transposed ? lane / 4 : lane % 4 * 2 + j;
      const uint16_t* from;
      std::memcpy(&from, all + emulation::kDeposit * (8 * i + at_row), sizeof from);
      pair[j] = from[at_column];
    }
    r[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}
}  // namespace emulated
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { emulated::ldmatrix<false>(r, row); }
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) { emulated::ldmatrix<true>(r, row); }

inline void copy_async_16(void* shared, const void* global) { emulation::copy_later(shared, global, 16); }
inline void copy_async_4(float* shared, const float* global) { emulation::copy_later(shared, global, 4); }
inline void copy_async_commit() { emulation::commit_copies(); }
template <int pending>
void copy_async_wait() {
  emulation::wait_for_copies(pending);
}

}  // namespace mesa::kernels::cuda
