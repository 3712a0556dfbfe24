// What the opaque descriptors of the emulated cuBLASLt hold.
#pragma once
#include <cublasLt.h>

#include <array>
#include <chrono>
#include <string>

#include "cublaslt_product.h"

namespace mesa::emulation {

struct Operation {
  int32_t compute_type, scale_type, pointer_mode, transposed_a, transposed_b, transposed_c, fill_mode;
  uint32_t epilogue;
  void* vector;
  int64_t vector_distance;
  int32_t sm_count, vector_type;
  int8_t fast_accumulation;
};
static_assert(sizeof(Operation) <= sizeof(cublasLtMatmulDescOpaque_t));
static_assert(sizeof(Layout) <= sizeof(cublasLtMatrixLayoutOpaque_t));

struct Preference {
  uint32_t search_mode;
  uint64_t workspace;
  uint32_t reduction_schemes, alignment[4];
  float waves;
  uint64_t implementations;
};
static_assert(sizeof(Preference) <= sizeof(cublasLtMatmulPreferenceOpaque_t));

inline Operation& operation_of(cublasLtMatmulDesc_t opaque) { return *reinterpret_cast<Operation*>(opaque); }
inline Layout& layout_of(cublasLtMatrixLayout_t opaque) { return *reinterpret_cast<Layout*>(opaque); }
inline Preference& preference_of(cublasLtMatmulPreference_t opaque) { return *reinterpret_cast<Preference*>(opaque); }

Preference fresh_preference();

/// As many algorithms the library suggests for each product; they compute the same. How often each ran, and how long it takes more.
inline constexpr int kAlgorithms = 3;
struct AlgorithmUse {
  std::chrono::microseconds delay{0};
  int runs = 0;
  bool fails = false;
  int configuration = 0, parts = 1, reduction_scheme = 0;  // as it says: into how many parts it splits k, and how they are added
};
extern std::array<AlgorithmUse, kAlgorithms> algorithm_uses;
/// Of products with an epilogue: what they take more, and how many of the algorithms can run them.
struct EpilogueUse {
  std::chrono::microseconds delay{0};
  int algorithms = kAlgorithms;
  float waves = 1;
};
extern EpilogueUse epilogue_use;

/// Why the last product of this thread was refused.
const std::string& why_refused();

}  // namespace mesa::emulation
