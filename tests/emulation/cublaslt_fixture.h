// Products described to the emulated cuBLASLt as an engine does, and the same by loops in double.
#pragma once
#include <cublasLt.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <functional>

#include "cublaslt_descriptors.h"
#include "device_memory.h"
#include "emulated.h"
#include "mesa/base/dtype.h"
#include "mesa/base/random.h"
#include "support/worst.h"

namespace mesa::testing {

/// Numbers in [-1, 1) that every type holds exactly.
inline std::vector<double> numbers(size_t count, uint64_t seed) {
  std::vector<double> out(count);
  for (size_t i = 0; i < count; ++i) out[i] = static_cast<double>(mix64(seed * 1000003 + i) % 256) / 128 - 1;
  return out;
}

inline size_t size_in(cudaDataType type) { return type == CUDA_R_16BF ? 2 : type == CUDA_R_32F ? 4 : 8; }

/// An array of any of the three types in device memory.
struct Array {
  cudaDataType type;
  OnDevice<unsigned char> bytes;
  Array(cudaDataType type, const std::vector<double>& values) : type(type), bytes(encoded(type, values)) {}
  void* data(size_t from = 0) const { return bytes.data() + from * size_in(type); }
  std::vector<double> get() const {
    const std::vector<unsigned char> raw = bytes.get();
    std::vector<double> out(raw.size() / size_in(type));
    for (size_t i = 0; i < out.size(); ++i) {
      if (type == CUDA_R_16BF) out[i] = value_at<bf16>(raw, i);
      if (type == CUDA_R_32F) out[i] = value_at<float>(raw, i);
      if (type == CUDA_R_64F) out[i] = value_at<double>(raw, i);
    }
    return out;
  }

 private:
  template <class T>
  static T value_at(const std::vector<unsigned char>& raw, size_t i) {
    T value;
    std::memcpy(&value, raw.data() + i * sizeof value, sizeof value);
    return value;
  }
  template <class T>
  static void append(std::vector<unsigned char>& out, double value) {
    const T narrow = static_cast<T>(value);
    const auto* bytes = reinterpret_cast<const unsigned char*>(&narrow);
    out.insert(out.end(), bytes, bytes + sizeof narrow);
  }
  static std::vector<unsigned char> encoded(cudaDataType type, const std::vector<double>& values) {
    std::vector<unsigned char> out;
    for (const double v : values) {
      if (type == CUDA_R_16BF) append<bf16>(out, static_cast<float>(v));
      if (type == CUDA_R_32F) append<float>(out, v);
      if (type == CUDA_R_64F) append<double>(out, v);
    }
    return out;
  }
};

struct Matrix {
  cudaDataType type = CUDA_R_32F;
  uint64_t rows = 1, columns = 1;
  int64_t leading = 1;
  int32_t order = CUBLASLT_ORDER_COL, batches = 1;
  int64_t distance = 0;
  size_t at(int64_t batch, uint64_t i, uint64_t j) const {
    const auto ld = static_cast<uint64_t>(leading);
    return static_cast<size_t>(batch * distance) + (order == CUBLASLT_ORDER_ROW ? i * ld + j : i + j * ld);
  }
  size_t size() const { return at(batches - 1, rows - 1, columns - 1) + 1; }
};

/// One call of the library, each part of which a test may spoil.
struct Call {
  cublasComputeType_t compute = CUBLAS_COMPUTE_32F;
  cudaDataType scale = CUDA_R_32F;
  cublasOperation_t op_a = CUBLAS_OP_N, op_b = CUBLAS_OP_N;
  uint32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  int32_t vector_type = -1;
  int64_t vector_distance = 0;
  Matrix a, b, c, d;
  double alpha = 1, beta = 0;
  const void *a_data = nullptr, *b_data = nullptr, *c_data = nullptr;
  void *d_data = nullptr, *vector = nullptr;
  uint64_t most_workspace = 0;
  uint32_t reduction_schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  uint32_t alignment[4] = {16, 16, 16, 16};
  std::function<void(Call&)> between = [](Call&) {};  // the choice of an algorithm and its use
  size_t workspace = 0;                               // what the algorithm asks for
  void* workspace_data = nullptr;

  cublasLtHandle_t handle = nullptr;
  cublasLtMatmulAlgo_t algorithm{};
  cublasStatus_t chosen = CUBLAS_STATUS_SUCCESS, run = CUBLAS_STATUS_SUCCESS;

  cublasLtMatmulDescOpaque_t operation() const {
    cublasLtMatmulDescOpaque_t out{};
    REQUIRE(cublasLtMatmulDescInit(&out, compute, scale) == CUBLAS_STATUS_SUCCESS);
    const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
      REQUIRE(cublasLtMatmulDescSetAttribute(&out, attribute, &value, sizeof value) == CUBLAS_STATUS_SUCCESS);
    };
    set(CUBLASLT_MATMUL_DESC_TRANSA, op_a);
    set(CUBLASLT_MATMUL_DESC_TRANSB, op_b);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
    set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, vector);
    set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, vector_type);
    set(CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE, vector_distance);
    return out;
  }
  static cublasLtMatrixLayoutOpaque_t layout(const Matrix& m) {
    cublasLtMatrixLayoutOpaque_t out{};
    REQUIRE(cublasLtMatrixLayoutInit(&out, m.type, m.rows, m.columns, m.leading) == CUBLAS_STATUS_SUCCESS);
    cublasLtMatrixLayoutSetAttribute(&out, CUBLASLT_MATRIX_LAYOUT_ORDER, &m.order, sizeof m.order);
    cublasLtMatrixLayoutSetAttribute(&out, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &m.batches, sizeof m.batches);
    cublasLtMatrixLayoutSetAttribute(&out, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &m.distance, sizeof m.distance);
    return out;
  }

  void choose() {
    cublasLtMatmulPreferenceOpaque_t preference{};
    cublasLtMatmulPreferenceInit(&preference);
    cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &most_workspace, sizeof most_workspace);
    cublasLtMatmulPreferenceSetAttribute(&preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction_schemes,
                                         sizeof reduction_schemes);
    const cublasLtMatmulPreferenceAttributes_t attributes[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    for (int i = 0; i < 4; ++i) cublasLtMatmulPreferenceSetAttribute(&preference, attributes[i], &alignment[i], sizeof alignment[i]);
    auto o = operation();
    auto la = layout(a), lb = layout(b), lc = layout(c), ld = layout(d);
    cublasLtMatmulHeuristicResult_t found{};
    int count = -1;
    chosen = cublasLtMatmulAlgoGetHeuristic(handle, &o, &la, &lb, &lc, &ld, &preference, 1, &found, &count);
    if (chosen == CUBLAS_STATUS_SUCCESS) CHECK(count == 1);
    algorithm = found.algo;
    workspace = found.workspaceSize;
  }
  void multiply() {
    auto o = operation();
    auto la = layout(a), lb = layout(b), lc = layout(c), ld = layout(d);
    const float narrow[] = {static_cast<float>(alpha), static_cast<float>(beta)};
    const void *first = &alpha, *second = &beta;
    if (scale == CUDA_R_32F) first = narrow, second = narrow + 1;
    run = cublasLtMatmul(handle, &o, first, a_data, &la, b_data, &lb, second, c_data, &lc, d_data, &ld, &algorithm, workspace_data,
                         workspace, nullptr);
  }
  /// Why it was refused.
  std::string go() {
    const std::string text = said([&] {
      REQUIRE(cublasLtCreate(&handle) == CUBLAS_STATUS_SUCCESS);
      choose();
      if (chosen == CUBLAS_STATUS_SUCCESS) {
        if (workspace > 0) cudaMalloc(&workspace_data, workspace);
        void* const mine = workspace_data;
        between(*this);
        multiply();
        cudaFree(mine);
      }
      CHECK(cublasLtDestroy(handle) == CUBLAS_STATUS_SUCCESS);
    });
    for (const cublasStatus_t status : {chosen, run}) {
      if (status == CUBLAS_STATUS_SUCCESS) continue;
      CHECK((text.find(emulation::why_refused()) != std::string::npos) == (status != CUBLAS_STATUS_NOT_SUPPORTED));
      return emulation::why_refused();
    }
    return text;
  }
};

inline double op(const std::vector<double>& x, const Matrix& m, cublasOperation_t transpose, int64_t batch, uint64_t i, uint64_t j) {
  return transpose == CUBLAS_OP_N ? x[m.at(batch, i, j)] : x[m.at(batch, j, i)];
}

struct Shape {
  uint64_t m, n, k;
};

/// [rows, columns] as memory may hold op(X): transposed, row-major, with a gap behind each column or row and each matrix.
inline Matrix matrix(cudaDataType type, uint64_t rows, uint64_t columns, cublasOperation_t transpose, int32_t order, int32_t batches,
                     int64_t gap) {
  if (transpose != CUBLAS_OP_N) std::swap(rows, columns);
  Matrix out{type, rows, columns, static_cast<int64_t>(order == CUBLASLT_ORDER_ROW ? columns : rows) + gap, order, batches, 0};
  if (batches > 1) out.distance = static_cast<int64_t>(out.at(0, rows - 1, columns - 1)) + 1 + gap;
  return out;
}

struct Kind {
  cudaDataType in, out;
  cublasComputeType_t compute;
  cudaDataType scale;
  double tolerance;
};
constexpr Kind kKinds[] = {{CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F, CUDA_R_32F, 1e-6},
                           {CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F_FAST_TF32, CUDA_R_32F, 1e-6},
                           {CUDA_R_16BF, CUDA_R_32F, CUBLAS_COMPUTE_32F, CUDA_R_32F, 1e-6},
                           {CUDA_R_16BF, CUDA_R_16BF, CUBLAS_COMPUTE_32F, CUDA_R_32F, 0.01},
                           {CUDA_R_64F, CUDA_R_64F, CUBLAS_COMPUTE_64F, CUDA_R_64F, 1e-14}};

/// A product with operands in memory.
struct Example {
  Call call;
  std::vector<double> a, b, c, bias;
  Array a_array, b_array, c_array, vector;

  Example(const Kind& kind, const Shape& shape, cublasOperation_t op_a, cublasOperation_t op_b, int32_t order, int32_t batches, int64_t gap)
      : call(described(kind, shape, op_a, op_b, order, batches, gap)),
        a(numbers(call.a.size(), 1)),
        b(numbers(call.b.size(), 2)),
        c(numbers(call.d.size(), 3)),
        bias(numbers(std::max(shape.m, shape.n), 4)),
        a_array(kind.in, a),
        b_array(kind.in, b),
        c_array(kind.out, c),
        vector(kind.out, bias) {
    call.a_data = a_array.data(), call.b_data = b_array.data();
    call.c_data = call.d_data = c_array.data();
  }
  explicit Example(const Kind& kind = kKinds[0], const Shape& shape = {8, 12, 4})
      : Example(kind, shape, CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_ORDER_COL, 1, 0) {}

  static Call described(const Kind& kind, const Shape& s, cublasOperation_t op_a, cublasOperation_t op_b, int32_t order, int32_t batches,
                        int64_t gap) {
    Call call;
    call.compute = kind.compute, call.scale = kind.scale, call.op_a = op_a, call.op_b = op_b;
    call.a = matrix(kind.in, s.m, s.k, op_a, order, batches, gap);
    call.b = matrix(kind.in, s.k, s.n, op_b, order, batches, gap);
    call.c = call.d = matrix(kind.out, s.m, s.n, CUBLAS_OP_N, order, batches, gap);
    return call;
  }
  uint64_t inner() const { return call.op_a == CUBLAS_OP_N ? call.a.columns : call.a.rows; }

  /// What D's memory must hold.
  std::vector<double> want() const {
    std::vector<double> out = c;
    for (int32_t batch = 0; batch < call.d.batches; ++batch)
      for (uint64_t i = 0; i < call.d.rows; ++i)
        for (uint64_t j = 0; j < call.d.columns; ++j) {
          double sum = 0;
          for (uint64_t l = 0; l < inner(); ++l) sum += op(a, call.a, call.op_a, batch, i, l) * op(b, call.b, call.op_b, batch, l, j);
          const size_t at = call.d.at(batch, i, j);
          out[at] = call.alpha * sum + call.beta * c[at] + (call.epilogue == CUBLASLT_EPILOGUE_BIAS ? bias[i] : 0);
        }
    return out;
  }
};

inline void check_close(const std::vector<double>& got, const std::vector<double>& want, double tolerance) {
  REQUIRE(got.size() == want.size());
  double worst = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::abs(got[i] - want[i]) / (1 + std::abs(want[i]));
    worst = worse(worst, error);
  }
  CHECK(worst <= tolerance);
}

}  // namespace mesa::testing
