// Division by a number that the host knows.
#pragma once
#include "cuda.h"

namespace mesa::kernels::cuda {
namespace {

/// n / divisor and n % divisor for n < 2^31 by a multiplication (Granlund and Montgomery, 1994).
struct Divider {
  uint32_t divisor = 1, magic = 1, shift = 0;

  explicit Divider(int64_t by = 1) : divisor(static_cast<uint32_t>(std::clamp<int64_t>(by, 1, int64_t{1} << 31))) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    magic = static_cast<uint32_t>((((uint64_t{1} << shift) - divisor) << 32) / divisor + 1);
  }
  __device__ uint32_t quotient(uint32_t n) const { return (__umulhi(n, magic) + n) >> shift; }
  __device__ uint32_t remainder(uint32_t n) const { return n - quotient(n) * divisor; }
};

}  // namespace
}  // namespace mesa::kernels::cuda
