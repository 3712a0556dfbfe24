// What CUDA C++ has beyond C++: how a kernel starts, dynamic shared memory, and the PTX instructions used here, each behind a small
// function. tests/emulation has a twin of this file, through which the same .cu sources run on a machine without a GPU.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>

#include "mesa/base/cuda.h"
#include "mesa/base/cuda_profile.h"

namespace mesa::kernels::cuda {

/// Lets every launch of the kernel have so much dynamic shared memory. Only raised, since a recorded launch may want more than the next.
inline void allow_shared_memory(const void* kernel, size_t bytes, const char* name) {
  static std::mutex mutex;
  static std::map<const void*, size_t>& allowed = *new std::map<const void*, size_t>;
  const std::lock_guard lock(mutex);
  size_t& most = allowed[kernel];
  if (bytes <= most) return;
  mesa::cuda::check_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), name);
  most = bytes;
}

/// Runs `kernel` on the current stream. `shared_bytes` of dynamic shared memory may be up to what the device opts in to (227 KB on sm_90).
/// Throws mesa::Error naming the kernel if it cannot start.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Arguments&&... arguments) {
  if (shared_bytes > 40 * 1024)  // with the kernel's static memory there may be 48 KB without it
    allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes, name);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(mesa::cuda::stream());
  const mesa::cuda::Timed timed(name);
  mesa::cuda::check_status(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
  if (mesa::cuda::synchronous()) mesa::cuda::check_status(cudaStreamSynchronize(config.stream), name);
}

/// The dynamic shared memory of this block, 16-byte aligned.
template <class T>
__device__ inline T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char mesa_dynamic_shared[];
  return reinterpret_cast<T*>(mesa_dynamic_shared);
}

/// The reduction over `width` neighbouring lanes (a power of two), in every lane: of the two halves, then of their halves. All lanes of the
/// warp must call it. F holds nothing.
template <int width = 32, class T, class F>
__device__ inline T warp_reduce(T value, F f) {
#pragma unroll
  for (int distance = width / 2; distance > 0; distance /= 2) value = f(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

/// Two floats rounded to bf16 (nearest even), `low` in the low half.
__device__ inline uint32_t pack_bf16(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

/// 2^x within 2^-22 of its value, 0 where that is subnormal: the one exponential that is not scalar.h's, because the special function unit
/// computes it beside the matrix units, which attention needs for its speed.
__device__ inline float exp2_approx(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

/// *p <- word, in global memory, by one instruction.
__device__ inline void store_global(uint32_t* p, uint32_t word) { asm volatile("st.global.b32 [%0], %1;" ::"l"(p), "r"(word) : "memory"); }
__device__ inline void store_global(uint2* p, uint2 word) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(word.x), "r"(word.y) : "memory");
}
__device__ inline void store_global(uint4* p, uint4 word) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w) : "memory");
}

/// *p <- word, in shared memory, by one instruction.
__device__ inline void store_shared(void* p, uint4 word) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(p));
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w) : "memory");
}

/// The smaller and the larger number in the order of IEEE 754-2019: -0 below +0, and NaN if either is NaN.
__device__ inline float minimum(float a, float b) {
  float out;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}
__device__ inline float maximum(float a, float b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}
/// The same for pairs of bf16.
__device__ inline uint32_t minimum_bf16(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}
__device__ inline uint32_t maximum_bf16(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}

/// Two integers clamped to 0..2^bits - 1, `low` in the lowest bits, `high` above it, and `rest` above both; bits is 2, 4 or 8.
template <int bits>
__device__ inline uint32_t pack_clamped(int32_t low, int32_t high, uint32_t rest) {
  uint32_t out;
  if constexpr (bits == 8)
    asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(high), "r"(low), "r"(rest));
  else if constexpr (bits == 4)
    asm("cvt.pack.sat.u4.s32.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(high), "r"(low), "r"(rest));
  else
    asm("cvt.pack.sat.u2.s32.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(high), "r"(low), "r"(rest));
  return out;
}

/// d += a b for one warp: a 16 x 16 (row), b 16 x 8 (column), bf16 in pairs, d 16 x 8 f32; lane l holds the elements that PTX's
/// mma.m16n8k16 gives it: d[0], d[1] row l / 4, columns 2 (l % 4) and + 1; d[2], d[3] row l / 4 + 8.
__device__ inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// Four 8 x 8 matrices of 16-bit elements from shared memory; lane l names row l % 8 of matrix l / 8 (16 bytes, 16-byte aligned), and
/// r[i] receives elements 2 (l % 4) and + 1 of row l / 4 of matrix i.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
/// The same with each matrix transposed.
__device__ inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

/// Copies 16 bytes (both 16-byte aligned) from global to shared memory in the background; wait for them with copy_async_wait and a barrier.
__device__ inline void copy_async_16(void* shared, const void* global) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global));
}
/// The same of 4 bytes.
__device__ inline void copy_async_4(float* shared, const float* global) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(global));
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;"); }
/// Waits until at most `pending` of this thread's committed groups are not done.
template <int pending>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending));
}

}  // namespace mesa::kernels::cuda
