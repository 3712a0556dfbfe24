// Runs CUDA kernels on the CPU, block by block, the threads of a block as fibers: for tests on machines without a GPU.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <type_traits>

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace mesa::emulation {

/// Runs `thread` once for each thread of each block. Throws mesa::Error naming the kernel and the block for a barrier that not every thread
/// reaches, a misused shuffle, a write beyond dynamic shared memory, and more threads or shared memory than an sm_90 block has.
void run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

/// How often each kernel has run, by name.
const std::map<std::string, int64_t>& launches();

/// The order in which blocks run, and the threads of a block between two barriers: a result that changes with it is a race. At first it is
/// what MESA_EMULATION_ORDER says (forward if nothing).
enum class Order { forward, reverse, shuffled };
void set_order(Order order);

// --- what a thread sees -----------------------------------------------------------------------------------------------------------

/// Waits for all threads of the block, at the same line of the source.
void barrier(int line);
/// The dynamic shared memory of the block: as long as the launch asked for, 16-byte aligned, all NaN at first.
unsigned char* shared_memory();
inline int lane() { return static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32); }
/// Ends the kernel with an error that names this thread.
[[noreturn]] void give_up(const std::string& what);

/// Deposits `bytes` (at most 64) of this lane, waits for all lanes of `mask` that have not left the kernel, and returns everyone's
/// deposits, 64 bytes apart, valid until this lane's next exchange. The lanes must meet in the same operation. `combine` changes the
/// deposits once, before anyone sees them.
const unsigned char* exchange(unsigned mask, const void* value, size_t bytes, const char* operation = "a warp operation",
                              void (*combine)(unsigned char* deposits) = nullptr);
inline constexpr size_t kDeposit = 64;
/// The same with all 32 lanes, none of which may be missing.
const unsigned char* exchange_warp(const void* value, size_t bytes, const char* operation,
                                   void (*combine)(unsigned char* deposits) = nullptr);

/// cp.async: copies happen when they are waited for, not before, so that a missing wait shows.
void copy_later(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies(int pending);

namespace detail {
extern unsigned present;
}
/// The lanes that took part in the exchange that has just returned.
inline unsigned present() { return detail::present; }

template <class T>
T shuffle(unsigned mask, T value, int source, const char* operation) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "a shuffle moves 2, 4 or 8 bytes");
  const unsigned char* all = exchange(mask, &value, sizeof value, operation);
  if (!(present() >> source & 1)) give_up("reads from a lane that takes no part in the shuffle");
  T out;
  std::memcpy(&out, all + kDeposit * source, sizeof out);
  return out;
}

/// The first lane of this lane's group of `width` lanes.
inline int group_of(int width) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) give_up("a shuffle's width must be a power of two up to 32");
  return lane() / width * width;
}

}  // namespace mesa::emulation

#undef __shared__
#define __shared__ static  // blocks run one after the other
#undef __launch_bounds__
#define __launch_bounds__(...)

// --- barriers and warps -----------------------------------------------------------------------------------------------------------

inline void __syncthreads(int line = __builtin_LINE()) { mesa::emulation::barrier(line); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { mesa::emulation::exchange(mask, "", 0, "__syncwarp"); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return mesa::emulation::shuffle(mask, value, mesa::emulation::group_of(width) + (source & (width - 1)), "__shfl_sync");
}
// Out of reach, a lane keeps its own value. __shfl_xor_sync reaches earlier groups, but no later ones.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32) {
  const int at = mesa::emulation::lane(), from = at ^ distance, end = mesa::emulation::group_of(width) + width;
  return mesa::emulation::shuffle(mask, value, from >= 0 && from < end ? from : at, "__shfl_xor_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int at = mesa::emulation::lane(), end = mesa::emulation::group_of(width) + width;
  const bool reached = distance < 32 && at + static_cast<int>(distance) < end;
  return mesa::emulation::shuffle(mask, value, reached ? at + static_cast<int>(distance) : at, "__shfl_down_sync");
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int at = mesa::emulation::lane(), first = mesa::emulation::group_of(width);
  const bool reached = distance < 32 && at - static_cast<int>(distance) >= first;
  return mesa::emulation::shuffle(mask, value, reached ? at - static_cast<int>(distance) : at, "__shfl_up_sync");
}

namespace mesa::emulation {
inline unsigned vote(unsigned mask, int predicate, const char* operation) {
  const unsigned char yes = predicate != 0;
  const unsigned char* all = exchange(mask, &yes, 1, operation);
  unsigned out = 0;
  for (int l = 0; l < 32; ++l)
    if (present() >> l & 1 && all[kDeposit * l]) out |= 1u << l;
  return out;
}
}  // namespace mesa::emulation
inline unsigned __ballot_sync(unsigned mask, int predicate) { return mesa::emulation::vote(mask, predicate, "__ballot_sync"); }
inline int __any_sync(unsigned mask, int predicate) { return mesa::emulation::vote(mask, predicate, "__any_sync") != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  const unsigned votes = mesa::emulation::vote(mask, predicate, "__all_sync");
  return votes == mesa::emulation::present();
}

inline void __threadfence() {}
inline void __threadfence_block() {}

// --- atomics ----------------------------------------------------------------------------------------------------------------------

// Threads run one at a time, so plain operations are atomic. Atomics of floats are left out: their sums depend on the order.
namespace mesa::emulation {
template <class T, class F>
T atomic(T* at, F change) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "atomics take integers of 4 or 8 bytes");
  const T old = *at;
  *at = static_cast<T>(change(old));
  return old;
}
}  // namespace mesa::emulation
template <class T, class U>
T atomicAdd(T* at, U value) {
  return mesa::emulation::atomic(
      at, [&](T old) { return static_cast<std::make_unsigned_t<T>>(old) + static_cast<std::make_unsigned_t<T>>(value); });
}
template <class T, class U>
T atomicMin(T* at, U value) {
  return mesa::emulation::atomic(at, [&](T old) { return static_cast<T>(value) < old ? static_cast<T>(value) : old; });
}
template <class T, class U>
T atomicMax(T* at, U value) {
  return mesa::emulation::atomic(at, [&](T old) { return old < static_cast<T>(value) ? static_cast<T>(value) : old; });
}
template <class T, class U>
T atomicExch(T* at, U value) {
  return mesa::emulation::atomic(at, [&](T) { return value; });
}
template <class T, class U, class V>
T atomicCAS(T* at, U compare, V value) {
  return mesa::emulation::atomic(at, [&](T old) { return old == static_cast<T>(compare) ? static_cast<T>(value) : old; });
}
template <class T, class U>
T atomicOr(T* at, U value) {
  return mesa::emulation::atomic(at, [&](T old) { return old | static_cast<T>(value); });
}
template <class T, class U>
T atomicAnd(T* at, U value) {
  return mesa::emulation::atomic(at, [&](T old) { return old & static_cast<T>(value); });
}

// --- arithmetic and memory --------------------------------------------------------------------------------------------------------

#define MESA_EMULATION_MIN_MAX(type)                        \
  inline type min(type a, type b) { return b < a ? b : a; } \
  inline type max(type a, type b) { return a < b ? b : a; }
MESA_EMULATION_MIN_MAX(int)
MESA_EMULATION_MIN_MAX(unsigned)
MESA_EMULATION_MIN_MAX(long)
MESA_EMULATION_MIN_MAX(unsigned long)
MESA_EMULATION_MIN_MAX(long long)
MESA_EMULATION_MIN_MAX(unsigned long long)
#undef MESA_EMULATION_MIN_MAX
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
/// Byte i of the result is byte (selector >> 4 i) & 7 of low (0..3) and high (4..7).
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
}
/// Rounds down and saturates; 0 for NaN.
inline int __float2int_rd(float x) {
  if (x != x) return 0;
  return x >= 0x1p31f ? INT32_MAX : x < -0x1p31f ? INT32_MIN : static_cast<int>(__builtin_floorf(x));
}
inline float rsqrtf(float x) { return 1.0f / __builtin_sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / __builtin_sqrt(x); }

namespace mesa::emulation {
/// The hints of the load and store instructions are for 1, 2, 4, 8 and 16 bytes at a multiple of that.
template <class T>
T* hinted(T* p) {
  static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0, "a load or store moves 1, 2, 4, 8 or 16 bytes");
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) give_up("a load or store of an unaligned address");
  return p;
}
}  // namespace mesa::emulation
inline float __fsub_rn(float a, float b) { return a - b; }
template <class T>
T __ldg(const T* p) {
  return *mesa::emulation::hinted(p);
}
template <class T>
T __ldcs(const T* p) {
  return *mesa::emulation::hinted(p);
}
template <class T>
T __ldcg(const T* p) {
  return *mesa::emulation::hinted(p);
}
template <class T>
void __stcs(T* p, T value) {
  *mesa::emulation::hinted(p) = value;
}
