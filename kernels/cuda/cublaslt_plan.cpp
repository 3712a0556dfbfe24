#include "cublaslt_plan.h"

#include <algorithm>
#include <charconv>

#include "mesa/base/cuda.h"
#include "mesa/base/error.h"

namespace mesa::kernels::cuda::blas {
namespace {

constexpr size_t kWorkspaceBytes = 32 << 20;  // what NVIDIA recommends for Hopper

cudaDataType_t data_type(DType dtype) { return dtype == DType::bf16 ? CUDA_R_16BF : dtype == DType::f64 ? CUDA_R_64F : CUDA_R_32F; }

Layout layout(const Matrix& m, const Batch& batch, int64_t distance) {
  cublasLtMatrixLayout_t created = nullptr;
  // Column-major: the elements that neighbour in memory are the rows.
  check_status(
      cublasLtMatrixLayoutCreate(&created, data_type(m.dtype), static_cast<uint64_t>(m.columns), static_cast<uint64_t>(m.rows), m.stride),
      "describing a matrix");
  Layout out(created);
  if (batch.count > 1) {
    const auto count = static_cast<int32_t>(batch.count);
    check_status(cublasLtMatrixLayoutSetAttribute(created, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count), "describing a batch");
    check_status(cublasLtMatrixLayoutSetAttribute(created, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &distance, sizeof distance),
                 "describing a batch");
  }
  return out;
}

template <class T>
void set(const Operation& operation, cublasLtMatmulDescAttributes_t attribute, const T& value) {
  check_status(cublasLtMatmulDescSetAttribute(operation.get(), attribute, &value, sizeof value), "describing a product");
}

Operation describe(const Form& form) {
  const bool wide = form.c.dtype == DType::f64;
  cublasLtMatmulDesc_t created = nullptr;
  check_status(cublasLtMatmulDescCreate(&created, wide ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F, wide ? CUDA_R_64F : CUDA_R_32F),
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

std::string to_string(const Matrix& m) {
  return concat(mesa::to_string(m.dtype), m.transposed ? " t " : " ", m.rows, "x", m.columns, "/", m.stride);
}

/// False for sums of parts that are added in any order or rounded; and for those which cuBLAS up to 13.7 may get wrong, on compute
/// capability 9.0 and later, where its configuration 66 splits k into parts that are not alike (release notes of CUDA 13.4 update 1,
/// 6580689).
bool sums_well(const cublasLtMatmulAlgo_t& algorithm, const Form& form) {
  int32_t configuration = 0, parts = 1, scheme = 0;
  for (const auto& [name, value] : {std::pair{CUBLASLT_ALGO_CONFIG_ID, &configuration},
                                    {CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &parts},
                                    {CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &scheme}})
    check_status(cublasLtMatmulAlgoConfigGetAttribute(&algorithm, name, value, sizeof *value, nullptr), "looking at an algorithm");
  const int64_t k = form.a.transposed ? form.a.rows : form.a.columns;
  const bool wrong = cublasLtGetVersion() <= 130700 && configuration == 66 && parts > 1 && k % parts != 0;
  return !wrong && (scheme == CUBLASLT_REDUCTION_SCHEME_NONE || scheme == CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
}

bool good(const cublasLtMatmulHeuristicResult_t& result) {
  return result.state == CUBLAS_STATUS_SUCCESS && result.workspaceSize <= kWorkspaceBytes;
}

}  // namespace

void check_status(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_ALLOC_FAILED) throw OutOfMemory(concat("out of memory on cuda: cublasLt: ", what));
  if (status != CUBLAS_STATUS_SUCCESS) fail("cublasLt: ", what, ": ", cublasLtGetStatusString(status));
}

void Destroy::operator()(cublasLtMatmulDesc_t operation) const { cublasLtMatmulDescDestroy(operation); }
void Destroy::operator()(cublasLtMatrixLayout_t layout) const { cublasLtMatrixLayoutDestroy(layout); }
void Destroy::operator()(cublasLtMatmulPreference_t preference) const { cublasLtMatmulPreferenceDestroy(preference); }

cublasLtHandle_t handle() {
  static const cublasLtHandle_t one = [] {
    cublasLtHandle_t h = nullptr;
    check_status(cublasLtCreate(&h), "starting the library");
    return h;
  }();
  return one;
}

Matrix matrix_of(const Tensor& t) {
  const int64_t rows = t.dim(-2), columns = t.dim(-1), down = t.strides()[-2], across = t.strides()[-1];
  // The stride of an extent of 1 means nothing to us, but is a leading dimension to cuBLASLt, which refuses one that is too small.
  if (across == 1 || columns == 1) return {t.dtype(), false, rows, columns, rows == 1 ? columns : down};
  check(down == 1 || rows == 1, "a matrix of shape ", t.shape(), " has no axis of neighbouring elements");
  return {t.dtype(), true, columns, rows, across};
}

uint32_t alignment_of(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  return address == 0 ? 256 : static_cast<uint32_t>(std::min<uintptr_t>(256, address & (~address + 1)));
}

std::string to_string(const Form& form) {
  const Batch& n = form.batch;
  std::string text = concat(to_string(form.a), " * ", to_string(form.b), " = ", to_string(form.c));
  if (n.count > 1) text += concat(", ", n.count, " at ", n.a, " ", n.b, " ", n.c);
  if (form.bias) text += concat(form.row_sums ? ", sums " : ", bias ", mesa::to_string(*form.bias));
  const Form::Alignment& at = form.aligned;
  return concat(text, ", aligned ", at.a, " ", at.b, " ", at.c, " ", at.bias);
}

void set_bias(const Plan& plan, const void* bias) { set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias); }

Plan make_plan(const Form& form, const void* bias, int most) {
  Plan plan;
  plan.operation = describe(form);
  if (bias != nullptr) set_bias(plan, bias);  // the heuristic looks at its alignment
  plan.left = layout(form.b, form.batch, form.batch.b);
  plan.right = layout(form.a, form.batch, form.batch.a);
  plan.result = layout(form.c, form.batch, form.batch.c);
  cublasLtMatmulPreference_t created = nullptr;
  check_status(cublasLtMatmulPreferenceCreate(&created), "choosing an algorithm");
  const Preference preference(created);
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    check_status(cublasLtMatmulPreferenceSetAttribute(preference.get(), attribute, &value, sizeof value), "choosing an algorithm");
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, form.aligned.b);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, form.aligned.a);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, form.aligned.c);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, form.aligned.c);
  // Where a product is summed up in parts, they are kept in f32 until the end, and added in one order: in place they come as they are done.
  prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  std::vector<cublasLtMatmulHeuristicResult_t> found(static_cast<size_t>(most));
  int count = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(handle(), plan.operation.get(), plan.left.get(), plan.right.get(), plan.result.get(),
                                     plan.result.get(), preference.get(), most, found.data(), &count);
  // Epilogues with a vector have a fallback, so whatever the library says against them counts as a no, but for a want of memory.
  if (status == CUBLAS_STATUS_NOT_SUPPORTED ||
      (form.bias && status != CUBLAS_STATUS_SUCCESS && status != CUBLAS_STATUS_ALLOC_FAILED && status != CUBLAS_STATUS_NOT_INITIALIZED))
    return plan;
  check_status(status, "choosing an algorithm");
  for (int i = 0; i < count; ++i) {
    const cublasLtMatmulHeuristicResult_t& result = found[static_cast<size_t>(i)];
    if (!good(result) || !sums_well(result.algo, form)) continue;
    if (plan.algorithms.empty()) plan.waves = result.wavesCount;
    plan.algorithms.push_back({result.algo, result.workspaceSize});
  }
  return plan;
}

std::string to_text(const Algorithm& algorithm) {
  std::string text;
  for (const uint64_t word : algorithm.value.data) text += concat(text.empty() ? "" : " ", word);
  return text;
}

size_t clearly_fastest(const std::vector<double>& seconds) {
  const auto least = std::min_element(seconds.begin(), seconds.end());
  return *least < std::min(0.98 * seconds[0], seconds[0] - 1e-6) ? static_cast<size_t>(least - seconds.begin()) : 0;
}

std::optional<Algorithm> from_text(const Form& form, const Plan& plan, const std::string& text) {
  Algorithm out;
  const char *at = text.c_str(), *const end = at + text.size();
  for (uint64_t& word : out.value.data) {
    at += at != end && *at == ' ';
    const auto [stop, error] = std::from_chars(at, end, word);
    if (error != std::errc()) return {};
    at = stop;
  }
  if (at != end) return {};
  cublasLtMatmulHeuristicResult_t result{};
  const cublasStatus_t status = cublasLtMatmulAlgoCheck(handle(), plan.operation.get(), plan.left.get(), plan.right.get(),
                                                        plan.result.get(), plan.result.get(), &out.value, &result);
  if (status != CUBLAS_STATUS_SUCCESS || !good(result) || !sums_well(out.value, form)) return {};
  out.workspace = result.workspaceSize;
  return out;
}

std::string library() { return concat("cublasLt ", cublasLtGetVersion(), " on ", mesa::cuda::describe_device()); }

}  // namespace mesa::kernels::cuda::blas
