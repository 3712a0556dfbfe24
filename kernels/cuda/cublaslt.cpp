// Matrix products through cuBLASLt. Everything here is row-major: cuBLASLt reads a row-major matrix as its transpose, so the product
// c = a b is asked for as c^T = b^T a^T, where b^T and a^T are what lies in memory. Algorithms are chosen once for each form of operands.
#include <cublasLt.h>

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <type_traits>

#include "mesa/base/cuda.h"
#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/matmul.h"

namespace mesa::kernels::cuda {
namespace {

constexpr size_t kWorkspaceBytes = 32 << 20;  // what NVIDIA recommends for Hopper

void check_blas(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_ALLOC_FAILED) throw OutOfMemory(concat("out of memory on cuda: cublasLt: ", what));
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

/// Gives an object of cuBLASLt back.
template <auto destroy>
struct Destroy {
  void operator()(auto* object) const { destroy(object); }
};
template <class Pointer, auto destroy>
using Owned = std::unique_ptr<std::remove_pointer_t<Pointer>, Destroy<destroy>>;
using Operation = Owned<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>;
using Layout = Owned<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;
using Preference = Owned<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>;

/// A product ready to run.
struct Plan {
  Operation operation;
  Layout left, right, result;
  cublasLtMatmulAlgo_t algorithm{};
  size_t workspace = 0;
  bool supported = false;
};

Layout layout(const Matrix& m, const Batch& batch, int64_t distance) {
  cublasLtMatrixLayout_t created = nullptr;
  // Column-major: the elements that neighbour in memory are the rows.
  check_blas(
      cublasLtMatrixLayoutCreate(&created, data_type(m.dtype), static_cast<uint64_t>(m.columns), static_cast<uint64_t>(m.rows), m.stride),
      "describing a matrix");
  Layout out(created);
  if (batch.count > 1) {
    const auto count = static_cast<int32_t>(batch.count);
    check_blas(cublasLtMatrixLayoutSetAttribute(created, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count), "describing a batch");
    check_blas(cublasLtMatrixLayoutSetAttribute(created, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &distance, sizeof distance),
               "describing a batch");
  }
  return out;
}

template <class T>
void set(const Operation& operation, cublasLtMatmulDescAttributes_t attribute, const T& value) {
  check_blas(cublasLtMatmulDescSetAttribute(operation.get(), attribute, &value, sizeof value), "describing a product");
}

Operation describe(const Form& form) {
  const bool wide = form.c.dtype == DType::f64;
  cublasLtMatmulDesc_t created = nullptr;
  check_blas(cublasLtMatmulDescCreate(&created, wide ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F, wide ? CUDA_R_64F : CUDA_R_32F),
             "describing a product");
  Operation out(created);
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
  cublasLtMatmulPreference_t created = nullptr;
  check_blas(cublasLtMatmulPreferenceCreate(&created), "choosing an algorithm");
  const Preference preference(created);
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    check_blas(cublasLtMatmulPreferenceSetAttribute(preference.get(), attribute, &value, sizeof value), "choosing an algorithm");
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, aligned.b);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, aligned.a);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, aligned.c);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, aligned.c);
  cublasLtMatmulHeuristicResult_t found{};
  int count = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(handle(), plan.operation.get(), plan.left.get(), plan.right.get(),
                                                               plan.result.get(), plan.result.get(), preference.get(), 1, &found, &count);
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

/// d <- a b (+ c) (+ bias), or with `row_sums` also bias <- sums; false if cuBLASLt has no algorithm for it.
bool run(const Form& form, const void* a, const void* b, const void* c, void* d, void* bias) {
  static std::mutex mutex;  // a plan's descriptor is changed before it is run
  const std::lock_guard lock(mutex);
  const Alignment aligned{alignment_of(a), alignment_of(b), std::min(alignment_of(c), alignment_of(d)), alignment_of(bias)};
  Plan& plan = cached(form, aligned, bias);
  if (!plan.supported) return false;
  if (bias != nullptr) set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
  const Tensor workspace = plan.workspace > 0 ? Tensor::empty({static_cast<int64_t>(plan.workspace)}, DType::u8, kCuda) : Tensor();
  const double one = 1, beta = form.accumulate ? 1 : 0;
  const float one_f = 1, beta_f = static_cast<float>(beta);
  const bool wide = form.c.dtype == DType::f64;
  const void *alpha = wide ? static_cast<const void*>(&one) : &one_f, *keep = wide ? static_cast<const void*>(&beta) : &beta_f;
  check_blas(cublasLtMatmul(handle(), plan.operation.get(), alpha, b, plan.left.get(), a, plan.right.get(), keep, c, plan.result.get(), d,
                            plan.result.get(), &plan.algorithm, workspace.defined() ? workspace.raw() : nullptr, plan.workspace,
                            static_cast<cudaStream_t>(mesa::cuda::stream())),
             "multiplying");
  if (mesa::cuda::synchronous()) mesa::cuda::synchronize("a product by cuBLASLt");
  return true;
}

/// The leading axes of a, b and c as one batch, if each has one constant distance; otherwise the longer of the last two, and the caller
/// loops over the other: heads of packed q, k and v, not images.
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
  else if (c.dim(-4) > c.dim(-3))
    out.inner = {c.dim(-4), a.strides()[-4], b.strides()[-4], c.strides()[-4]}, out.outer = c.dim(-3),
    out.step = {a.strides()[-3], b.strides()[-3], c.strides()[-3]};
  else
    out.outer = c.dim(-4), out.step = {a.strides()[-4], b.strides()[-4], c.strides()[-4]};
  return out;
}

void* moved(const Tensor& t, int64_t elements) { return static_cast<char*>(t.raw()) + elements * size_of(t.dtype()); }

}  // namespace

void product(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& bias, const Tensor& addend) {
  const Batches batches = batches_of(a, b, c);
  Form form{matrix_of(a), matrix_of(b), matrix_of(c), batches.inner, {}, addend.defined(), false};
  check(!form.c.transposed || !bias.defined(), "a biased product into a transposed matrix of shape ", c.shape());
  if (form.c.transposed)
    return product(b.transpose(-1, -2), a.transpose(-1, -2), c.transpose(-1, -2), bias,
                   addend.defined() ? addend.transpose(-1, -2) : addend);
  const Tensor& plus = addend.defined() ? addend : c;  // beta is 0 where nothing is added
  const auto try_with = [&](const Tensor& with) {
    form.bias = with.defined() ? std::optional(with.dtype()) : std::nullopt;
    for (int64_t i = 0; i < batches.outer; ++i)
      if (!run(form, moved(a, i * batches.step[0]), moved(b, i * batches.step[1]), moved(plus, i * batches.step[2]),
               moved(c, i * batches.step[2]), with.defined() ? with.raw() : nullptr))
        return false;  // the first already: all have one form
    return true;
  };
  if (bias.defined()) {
    Tensor with = bias;
    if (bias.dtype() != c.dtype()) {  // the epilogue wants the bias in the result's type (cublasLt.h, BIAS_DATA_TYPE)
      with = empty_like(bias, c.dtype());
      kernels::copy(bias, with);
    }
    if (try_with(with)) return;
  }
  check(try_with(Tensor()), "cublasLt has no product of ", a.shape(), " ", to_string(a.dtype()), " and ", b.shape(), " into ",
        to_string(c.dtype()));
  if (bias.defined()) kernels::add_rows(c, bias, c);
}

bool product_and_row_sums(const Tensor& dy, const Tensor& x, const Tensor& dw, bool accumulate, const Tensor& db) {
  const Tensor a = dy.transpose(0, 1);
  const Form form{matrix_of(a), matrix_of(x), matrix_of(dw), {}, db.dtype(), accumulate, true};
  if (form.c.transposed || dy.dim(0) == 0 || dw.numel() == 0) return false;
  return run(form, a.raw(), x.raw(), dw.raw(), dw.raw(), db.raw());
}

}  // namespace mesa::kernels::cuda
