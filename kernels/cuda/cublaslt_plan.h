// What cuBLASLt is told about a product. Everything is row-major here: cuBLASLt reads a row-major matrix as its transpose, so the product
// c = a b is asked for as c^T = b^T a^T, where b^T and a^T are what lies in memory.
#pragma once
#include <cublasLt.h>

#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "mesa/tensor/tensor.h"

namespace mesa::kernels::cuda::blas {

/// Throws for anything but success, OutOfMemory where the library had none.
void check_status(cublasStatus_t status, const char* what);
cublasLtHandle_t handle();

/// One operand as memory holds it: `rows` rows of `columns` neighbouring elements at a distance of `stride`; a transposed view of such
/// memory has its last stride elsewhere, so its extents change places and `transposed` says so.
struct Matrix {
  DType dtype;
  bool transposed;
  int64_t rows, columns, stride;
  auto operator<=>(const Matrix&) const = default;
};
Matrix matrix_of(const Tensor& t);

/// Products that one call makes: `count` matrices at constant distances (in elements) of a, b and c.
struct Batch {
  int64_t count = 1, a = 0, b = 0, c = 0;
  auto operator<=>(const Batch&) const = default;
};

/// Everything that the choice of an algorithm depends on.
struct Form {
  Matrix a, b, c;
  Batch batch;
  std::optional<DType> bias;  ///< added to every row, or with `row_sums` written: the sums
  bool row_sums;
  /// That an algorithm may count on, in bytes: what every tensor of this form has.
  struct Alignment {
    uint32_t a = 0, b = 0, c = 0, bias = 0;
    auto operator<=>(const Alignment&) const = default;
  } aligned;
  auto operator<=>(const Form&) const = default;
};
uint32_t alignment_of(const void* p);
/// "bf16 25216x384/384 * bf16 t 1152x384/384 = bf16 25216x1152/1152 + bias bf16, aligned 256 256 256 256".
std::string to_string(const Form& form);

/// Gives an object of cuBLASLt back.
struct Destroy {
  void operator()(cublasLtMatmulDesc_t operation) const;
  void operator()(cublasLtMatrixLayout_t layout) const;
  void operator()(cublasLtMatmulPreference_t preference) const;
};
template <class Pointer>
using Owned = std::unique_ptr<std::remove_pointer_t<Pointer>, Destroy>;
using Operation = Owned<cublasLtMatmulDesc_t>;
using Layout = Owned<cublasLtMatrixLayout_t>;
using Preference = Owned<cublasLtMatmulPreference_t>;

struct Algorithm {
  cublasLtMatmulAlgo_t value{};
  size_t workspace = 0;
};

/// A product ready to run.
struct Plan {
  Operation operation;
  Layout left, right, result;
  std::vector<Algorithm> algorithms;  ///< that can run it, what is thought fastest first; none: another way is taken
  float waves = 0;                    ///< of blocks that the first makes of the GPU, by the library's word: below 1 a part of it idles
  bool open = false;                  ///< which is fastest is still to be found out
};
/// With at most `most` algorithms. `bias`: the vector of the first call.
Plan make_plan(const Form& form, const void* bias, int most);
void set_bias(const Plan& plan, const void* bias);

/// Which of several algorithms took the fewest seconds: the first, which is the library's suggestion, unless another is faster by more than
/// what the clock may be wrong, 2 % and a microsecond.
size_t clearly_fastest(const std::vector<double>& seconds);

/// An algorithm as text, for another process with the same library on such a GPU; and back, if the library would still run the plan by it.
std::string to_text(const Algorithm& algorithm);
std::optional<Algorithm> from_text(const Form& form, const Plan& plan, const std::string& text);
/// "cublasLt 130101 on NVIDIA H200, compute capability 9.0, driver 13.0".
std::string library();

}  // namespace mesa::kernels::cuda::blas
