// The sums behind the emulated cuBLASLt: D = alpha op(A) op(B) + beta C with an epilogue, on memory that is open.
#pragma once
#include <library_types.h>

#include <cstddef>
#include <cstdint>

namespace mesa::emulation {

/// Matrices in memory, as a cublasLtMatrixLayout_t says.
struct Layout {
  cudaDataType type = CUDA_R_32F;
  int32_t row_major = 0;
  uint64_t rows = 0, columns = 0;
  int64_t leading = 0;
  int32_t batches = 1;
  int64_t distance = 0;  // of matrices of a batch, in elements

  int64_t at(int64_t row, int64_t column) const { return row_major ? row * leading + column : row + column * leading; }
  int64_t at(int64_t batch, int64_t row, int64_t column) const { return batch * distance + at(row, column); }
};

size_t size_of(cudaDataType type);

enum class Epilogue { none, bias, sums_of_a, sums_of_b };

struct Product {
  Layout a, b, c, d;
  bool transposed_a = false, transposed_b = false;
  double alpha = 1, beta = 0;
  Epilogue epilogue = Epilogue::none;
  const void *a_data = nullptr, *b_data = nullptr, *c_data = nullptr;
  void *d_data = nullptr, *vector = nullptr;  // the epilogue's: a bias that is read, or sums that are written
  cudaDataType vector_type = CUDA_R_32F;
  int64_t vector_distance = 0;  // from batch to batch

  int64_t m() const { return static_cast<int64_t>(d.rows); }
  int64_t n() const { return static_cast<int64_t>(d.columns); }
  int64_t k() const { return static_cast<int64_t>(transposed_a ? a.rows : a.columns); }
};

void multiply(const Product& product);

/// True if the matrices at these addresses have an element in common.
bool overlap(const Layout& x, const void* x_data, const Layout& y, const void* y_data);

}  // namespace mesa::emulation
