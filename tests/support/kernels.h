// What tests of kernels share: random tensors, every implementation that this CPU runs, and comparison with doubles.
#pragma once
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>

#include "mesa/kernels/kernel.h"
#include "support/device.h"
#include "support/random.h"
#include "support/worst.h"

namespace mesa::testing {

/// Normal values times `spread`; the seed stands in every failure.
inline Tensor random(const Shape& shape, DType dtype, const std::string& name, double spread = 1) {
  UNSCOPED_INFO(seed_note());
  std::vector<double> values = normal_values(shape.numel(), name);
  for (double& v : values) v *= spread;
  return tensor_of(shape, values, dtype);
}

/// The implementations of a kernel that the test device has: the CUDA one, or one for each instruction set of this CPU; sanitized builds
/// may lack one between the plain one and the best.
template <class Signature>
std::vector<std::function<Signature>> implementations(const kernels::Kernel<Signature>& kernel) {
  if (test_device() == kCuda) return {staged(kernel.cuda)};
  Signature* const all[] = {kernel.plain, kernel.avx2, kernel.avx512};
  const auto best = static_cast<size_t>(cpu_isa());
  check(all[best] != nullptr, "this build has no ", to_string(cpu_isa()), " kernel ", kernel.name);
  std::vector<std::function<Signature>> out;
  for (size_t isa = 0; isa <= best; ++isa)
    if (all[isa] != nullptr) out.push_back(all[isa]);
  return out;
}

/// y holds `want` up to `tolerance`, relative to magnitude 1 or more; where an element is a sum that may cancel, `terms` says how large
/// its terms are together.
inline void expect(const Tensor& y, const std::vector<double>& want, double tolerance, const std::vector<double>& terms = {}) {
  const std::vector<double> got = y.to_vector<double>();
  REQUIRE(got.size() == want.size());
  double worst = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double magnitude = std::max(std::fabs(want[i]), terms.empty() ? 0.0 : terms[i]);
    const double error = std::fabs(got[i] - want[i]) / std::max(1.0, magnitude);
    worst = worse(worst, error);
  }
  INFO(seed_note());
  CHECK(worst <= tolerance);
}

}  // namespace mesa::testing
