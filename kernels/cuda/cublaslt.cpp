// Matrix products through cuBLASLt. Everything here is row-major: cuBLASLt reads a row-major matrix as its transpose, so the product
// c = a b is asked for as c^T = b^T a^T, where b^T and a^T are what lies in memory. Algorithms are chosen once for each form of operands.
#include <cublasLt.h>

#include <array>
#include <map>
#include <mutex>
#include <optional>

#include "mesa/base/cuda.h"
#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/matmul.h"

namespace mesa::kernels::cuda {
namespace {

constexpr size_t kWorkspaceBytes = 32 << 20;  // what NVIDIA recommends for Hopper

void check_blas(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS) fail("cublasLt: ", what, ": ", cublasLtGetStatusString(status));
}

cublasLtHandle_t handle() {
  static const cublasLtHandle_t one = [] {
    cublasLtHandle_t h = nullptr;
    check_blas(cublasLtCreate(&h), "starting the library");
    return h;
  }();
  return one;
}

cudaDataType_t data_type(DType dtype) { return dtype == DType::bf16 ? CUDA_R_16BF : dtype == DType::f64 ? CUDA_R_64F : CUDA_R_32F; }

/// One operand as memory holds it: `rows` rows of `columns` neighbouring elements at a distance of `stride`; a transposed view of such
/// memory has its last stride elsewhere, so its extents change places and `transposed` says so.
struct Matrix {
  DType dtype;
  bool transposed;
  int64_t rows, columns, stride;
  auto operator<=>(const Matrix&) const = default;
};

Matrix matrix_of(const Tensor& t) {
  const int64_t rows = t.dim(-2), columns = t.dim(-1), down = t.strides()[-2], across = t.strides()[-1];
  // The stride of an extent of 1 means nothing to us, but is a leading dimension to cuBLASLt, which refuses one that is too small.
  if (across == 1 || columns == 1) return {t.dtype(), false, rows, columns, rows == 1 ? columns : down};
  check(down == 1 || rows == 1, "a matrix of shape ", t.shape(), " has no axis of neighbouring elements");
  return {t.dtype(), true, columns, rows, across};
}

/// Products that one call makes: `count` matrices at constant distances (in elements) of a, b and c.
struct Batch {
  int64_t count = 1, a = 0, b = 0, c = 0;
  auto operator<=>(const Batch&) const = default;
};

/// Everything that the choice of an algorithm depends on.
struct Form {
  Matrix a, b, c;
  Batch batch;
  std::optional<DType> bias;  // added to every row, or with `row_sums` written: the sums
  bool accumulate, row_sums;
  auto operator<=>(const Form&) const = default;
};

/// A product ready to run; descriptors live as long as the process.
struct Plan {
  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t left = nullptr, right = nullptr, result = nullptr;
  cublasLtMatmulAlgo_t algorithm{};
  size_t workspace = 0;
  bool supported = false;
};

cublasLtMatrixLayout_t layout(const Matrix& m, const Batch& batch, int64_t distance) {
  cublasLtMatrixLayout_t out = nullptr;
  // Column-major: the elements that neighbour in memory are the rows.
  check_blas(
      cublasLtMatrixLayoutCreate(&out, data_type(m.dtype), static_cast<uint64_t>(m.columns), static_cast<uint64_t>(m.rows), m.stride),
      "describing a matrix");
  if (batch.count > 1) {
    const auto count = static_cast<int32_t>(batch.count);
    check_blas(cublasLtMatrixLayoutSetAttribute(out, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count), "describing a batch");
    check_blas(cublasLtMatrixLayoutSetAttribute(out, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &distance, sizeof distance),
               "describing a batch");
  }
  return out;
}

template <class T>
void set(cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t attribute, const T& value) {
  check_blas(cublasLtMatmulDescSetAttribute(operation, attribute, &value, sizeof value), "describing a product");
}

cublasLtMatmulDesc_t describe(const Form& form) {
  const bool wide = form.c.dtype == DType::f64;
  cublasLtMatmulDesc_t out = nullptr;
  check_blas(cublasLtMatmulDescCreate(&out, wide ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F, wide ? CUDA_R_64F : CUDA_R_32F),
             "describing a product");
  // c^T = b^T a^T: b is on the left.
  set(out, CUBLASLT_MATMUL_DESC_TRANSA, form.b.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(out, CUBLASLT_MATMUL_DESC_TRANSB, form.a.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
  if (form.bias) {
    // BGRADB: sums over k of the right operand, which is the engine's a = dy^T.
    set(out, CUBLASLT_MATMUL_DESC_EPILOGUE, form.row_sums ? CUBLASLT_EPILOGUE_BGRADB : CUBLASLT_EPILOGUE_BIAS);
    set(out, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, data_type(*form.bias));
  }
  return out;
}

/// Alignment that the plan may count on: what every tensor of this form has, since forms are keyed by it.
struct Alignment {
  uint32_t a, b, c, bias;
  auto operator<=>(const Alignment&) const = default;
};

uint32_t alignment_of(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  return address == 0 ? 256 : static_cast<uint32_t>(std::min<uintptr_t>(256, address & (~address + 1)));
}

Plan make(const Form& form, const Alignment& aligned, const void* bias) {
  Plan plan;
  plan.operation = describe(form);
  if (bias != nullptr) set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);  // the heuristic looks at its alignment
  plan.left = layout(form.b, form.batch, form.batch.b);
  plan.right = layout(form.a, form.batch, form.batch.a);
  plan.result = layout(form.c, form.batch, form.batch.c);
  cublasLtMatmulPreference_t preference = nullptr;
  check_blas(cublasLtMatmulPreferenceCreate(&preference), "choosing an algorithm");
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    check_blas(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value), "choosing an algorithm");
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, aligned.b);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, aligned.a);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, aligned.c);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, aligned.c);
  cublasLtMatmulHeuristicResult_t found{};
  int count = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(handle(), plan.operation, plan.left, plan.right, plan.result, plan.result,
                                                               preference, 1, &found, &count);
  cublasLtMatmulPreferenceDestroy(preference);
  // Epilogues with a vector have a fallback, so whatever the library says against them counts as a no.
  const bool refused = status == CUBLAS_STATUS_NOT_SUPPORTED || (form.bias && status != CUBLAS_STATUS_SUCCESS);
  if (refused || (status == CUBLAS_STATUS_SUCCESS && (count == 0 || found.state != CUBLAS_STATUS_SUCCESS))) return plan;
  check_blas(status, "choosing an algorithm");
  plan.algorithm = found.algo;
  plan.workspace = found.workspaceSize;
  plan.supported = true;
  return plan;
}

Plan& cached(const Form& form, const Alignment& aligned, const void* bias) {
  static std::map<std::pair<Form, Alignment>, Plan> plans;
  auto found = plans.find({form, aligned});
  if (found == plans.end()) found = plans.emplace(std::pair{form, aligned}, make(form, aligned, bias)).first;
  return found->second;
}

/// c <- a b (+ c) (+ bias), or with `row_sums` also bias <- sums; false if cuBLASLt has no algorithm for it.
bool run(const Form& form, const void* a, const void* b, void* c, void* bias) {
  static std::mutex mutex;  // a plan's descriptor is changed before it is run
  const std::lock_guard lock(mutex);
  const Alignment aligned{alignment_of(a), alignment_of(b), alignment_of(c), alignment_of(bias)};
  Plan& plan = cached(form, aligned, bias);
  if (!plan.supported) return false;
  if (bias != nullptr) set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
  const Tensor workspace = plan.workspace > 0 ? Tensor::empty({static_cast<int64_t>(plan.workspace)}, DType::u8, kCuda) : Tensor();
  const double one = 1, beta = form.accumulate ? 1 : 0;
  const float one_f = 1, beta_f = static_cast<float>(beta);
  const bool wide = form.c.dtype == DType::f64;
  const void *alpha = wide ? static_cast<const void*>(&one) : &one_f, *keep = wide ? static_cast<const void*>(&beta) : &beta_f;
  check_blas(
      cublasLtMatmul(handle(), plan.operation, alpha, b, plan.left, a, plan.right, keep, c, plan.result, c, plan.result, &plan.algorithm,
                     workspace.defined() ? workspace.raw() : nullptr, plan.workspace, static_cast<cudaStream_t>(mesa::cuda::stream())),
      "multiplying");
  if (mesa::cuda::synchronous()) mesa::cuda::synchronize();
  return true;
}

/// The leading axes of a, b and c as one batch, if each has one constant distance; otherwise the last of them, and the caller loops.
struct Batches {
  int64_t outer = 1;              // loops
  Batch inner;                    // one call
  std::array<int64_t, 3> step{};  // of a, b, c from loop to loop, where there are two leading axes
};

Batches batches_of(const Tensor& a, const Tensor& b, const Tensor& c) {
  Batches out;
  if (c.rank() == 2) return out;
  out.inner = {c.dim(-3), a.strides()[-3], b.strides()[-3], c.strides()[-3]};
  if (c.rank() == 3) return out;
  const auto joins = [](const Tensor& t) { return t.strides()[-4] == t.strides()[-3] * t.dim(-3); };
  if (c.dim(-3) == 1)
    out.inner = {c.dim(-4), a.strides()[-4], b.strides()[-4], c.strides()[-4]};
  else if (joins(a) && joins(b) && joins(c))
    out.inner.count *= c.dim(-4);
  else
    out.outer = c.dim(-4), out.step = {a.strides()[-4], b.strides()[-4], c.strides()[-4]};
  return out;
}

void* moved(const Tensor& t, int64_t elements) { return static_cast<char*>(t.raw()) + elements * size_of(t.dtype()); }

}  // namespace

void product(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& bias, bool accumulate) {
  const Batches batches = batches_of(a, b, c);
  Form form{matrix_of(a), matrix_of(b), matrix_of(c), batches.inner, {}, accumulate, false};
  check(!form.c.transposed || !bias.defined(), "a biased product into a transposed matrix of shape ", c.shape());
  if (form.c.transposed) return product(b.transpose(-1, -2), a.transpose(-1, -2), c.transpose(-1, -2), bias, accumulate);
  const auto try_with = [&](const Tensor& addend) {
    form.bias = addend.defined() ? std::optional(addend.dtype()) : std::nullopt;
    for (int64_t i = 0; i < batches.outer; ++i)
      if (!run(form, moved(a, i * batches.step[0]), moved(b, i * batches.step[1]), moved(c, i * batches.step[2]),
               addend.defined() ? addend.raw() : nullptr))
        return false;  // the first already: all have one form
    return true;
  };
  if (bias.defined()) {
    if (try_with(bias)) return;
    if (bias.dtype() != c.dtype()) {  // the epilogue may want the bias in the result's type
      const Tensor converted = empty_like(bias, c.dtype());
      kernels::copy(bias, converted);
      if (try_with(converted)) return;
    }
  }
  check(try_with(Tensor()), "cublasLt has no product of ", a.shape(), " ", to_string(a.dtype()), " and ", b.shape(), " into ",
        to_string(c.dtype()));
  if (bias.defined()) kernels::add_rows(c, bias, c);
}

bool product_and_row_sums(const Tensor& dy, const Tensor& x, const Tensor& dw, bool accumulate, const Tensor& db) {
  const Tensor a = dy.transpose(0, 1);
  const Form form{matrix_of(a), matrix_of(x), matrix_of(dw), {}, db.dtype(), accumulate, true};
  if (form.c.transposed || dy.dim(0) == 0 || dw.numel() == 0) return false;
  return run(form, a.raw(), x.raw(), dw.raw(), db.raw());
}

}  // namespace mesa::kernels::cuda
