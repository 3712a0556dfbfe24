// Seeds of randomized tests: drawn anew in every run, printed with every failure, fixed by MESA_TEST_SEED.
#pragma once
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "mesa/base/random.h"
#include "mesa/tensor/tensor.h"

namespace mesa::testing {

inline uint64_t test_seed() {
  static const uint64_t seed = [] {
    const char* fixed = std::getenv("MESA_TEST_SEED");
    return fixed ? std::strtoull(fixed, nullptr, 10) : uint64_t{std::random_device{}()};
  }();
  return seed;
}

/// For INFO: how to get the same numbers again.
inline std::string seed_note() { return "MESA_TEST_SEED=" + std::to_string(test_seed()); }

/// Standard normal values, each a float, so that every precision starts from the same numbers.
inline std::vector<double> normal_values(int64_t n, const std::string& stream) {
  RandomStream random(RandomKey::of(test_seed(), stream, 0));
  std::vector<double> out(n);
  for (double& v : out) v = static_cast<float>(random.normal());
  return out;
}

/// A CPU tensor of `dtype` holding `values` rounded to it.
inline Tensor tensor_of(const Shape& shape, const std::vector<double>& values, DType dtype, MemoryKind kind = MemoryKind::workspace) {
  Tensor out = Tensor::empty(shape, dtype, kCpu, kind);
  check(out.numel() == static_cast<int64_t>(values.size()), "a tensor of shape ", shape, " cannot hold ", values.size(), " values");
  dispatch_float(dtype, [&](auto tag) {
    using T = decltype(tag);
    for (size_t i = 0; i < values.size(); ++i) {
      if constexpr (std::is_same_v<T, bf16>)
        out.data<T>()[i] = bf16(static_cast<float>(values[i]));
      else
        out.data<T>()[i] = static_cast<T>(values[i]);
    }
  });
  return out;
}

inline Tensor normal_tensor(const Shape& shape, const std::string& stream, DType dtype = DType::f32,
                            MemoryKind kind = MemoryKind::workspace) {
  return tensor_of(shape, normal_values(shape.numel(), stream), dtype, kind);
}

}  // namespace mesa::testing
