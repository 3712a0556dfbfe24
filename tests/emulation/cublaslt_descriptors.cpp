// The descriptors of the emulated cuBLASLt, its handle and the words for its states.
#include "cublaslt_descriptors.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

struct cublasLtContext {};

namespace mesa::emulation {
namespace {

/// Where a descriptor keeps an attribute.
struct Field {
  int attribute;
  size_t offset, bytes;
};
#define MESA_FIELD(attribute, type, member) \
  Field { attribute, offsetof(type, member), sizeof(type::member) }
const Field kOperationFields[] = {
    MESA_FIELD(CUBLASLT_MATMUL_DESC_COMPUTE_TYPE, Operation, compute_type),
    MESA_FIELD(CUBLASLT_MATMUL_DESC_SCALE_TYPE, Operation, scale_type),
    MESA_FIELD(CUBLASLT_MATMUL_DESC_POINTER_MODE, Operation, pointer_mode),
    MESA_FIELD(CUBLASLT_MATMUL_DESC_TRANSA, Operation, transposed_a),
    MESA_FIELD(CUBLASLT_MATMUL_DESC_TRANSB, Operation, transposed_b),
    MESA_FIELD(CUBLASLT_MATMUL_DESC_TRANSC, Operation, transposed_c),
    MESA_FIELD(CUBLASLT_MATMUL_DESC_FILL_MODE, Operation, fill_mode),
    MESA_FIELD(CUBLASLT_MATMUL_DESC_EPILOGUE, Operation, epilogue),
    MESA_FIELD(CUBLASLT_MATMUL_DESC_BIAS_POINTER, Operation, vector),
    MESA_FIELD(CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE, Operation, vector_distance),
    MESA_FIELD(CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET, Operation, sm_count),
    MESA_FIELD(CUBLASLT_MATMUL_DESC_FAST_ACCUM, Operation, fast_accumulation),
    MESA_FIELD(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, Operation, vector_type),
};
const Field kLayoutFields[] = {
    MESA_FIELD(CUBLASLT_MATRIX_LAYOUT_TYPE, Layout, type),
    MESA_FIELD(CUBLASLT_MATRIX_LAYOUT_ORDER, Layout, row_major),
    MESA_FIELD(CUBLASLT_MATRIX_LAYOUT_ROWS, Layout, rows),
    MESA_FIELD(CUBLASLT_MATRIX_LAYOUT_COLS, Layout, columns),
    MESA_FIELD(CUBLASLT_MATRIX_LAYOUT_LD, Layout, leading),
    MESA_FIELD(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, Layout, batches),
    MESA_FIELD(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, Layout, distance),
};
const Field kPreferenceFields[] = {
    MESA_FIELD(CUBLASLT_MATMUL_PREF_SEARCH_MODE, Preference, search_mode),
    MESA_FIELD(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, Preference, workspace),
    MESA_FIELD(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, Preference, reduction_schemes),
    MESA_FIELD(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, Preference, alignment[0]),
    MESA_FIELD(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, Preference, alignment[1]),
    MESA_FIELD(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, Preference, alignment[2]),
    MESA_FIELD(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, Preference, alignment[3]),
    MESA_FIELD(CUBLASLT_MATMUL_PREF_MAX_WAVES_COUNT, Preference, waves),
    MESA_FIELD(CUBLASLT_MATMUL_PREF_IMPL_MASK, Preference, implementations),
};
#undef MESA_FIELD

template <size_t count>
const Field* field_of(const Field (&fields)[count], int attribute) {
  const Field* found = std::find_if(fields, fields + count, [&](const Field& f) { return f.attribute == attribute; });
  if (found != fields + count) return found;
  std::fprintf(stderr, "emulation: cuBLASLt: attribute %d is not emulated\n", attribute);
  return nullptr;
}

/// As the library does: the size must fit, and the value is looked at when it is used.
template <size_t count>
cublasStatus_t set_attribute(void* descriptor, const Field (&fields)[count], int attribute, const void* from, size_t bytes) {
  const Field* field = field_of(fields, attribute);
  if (descriptor == nullptr || field == nullptr || from == nullptr || bytes != field->bytes) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(static_cast<char*>(descriptor) + field->offset, from, bytes);
  return CUBLAS_STATUS_SUCCESS;
}
template <size_t count>
cublasStatus_t get_attribute(const void* descriptor, const Field (&fields)[count], int attribute, void* to, size_t bytes, size_t* written) {
  const Field* field = field_of(fields, attribute);
  if (descriptor == nullptr || field == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  if (bytes == 0 ? written == nullptr : (to == nullptr || bytes != field->bytes)) return CUBLAS_STATUS_INVALID_VALUE;
  if (bytes != 0) std::memcpy(to, static_cast<const char*>(descriptor) + field->offset, bytes);
  if (written != nullptr) *written = field->bytes;
  return CUBLAS_STATUS_SUCCESS;
}

/// Descriptors are made in memory of the caller or of ours.
template <class Contents, class Opaque>
cublasStatus_t initialize(Opaque* opaque, size_t bytes, const Contents& contents) {
  if (opaque == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  if (bytes < sizeof(Opaque)) return CUBLAS_STATUS_ALLOC_FAILED;
  std::memcpy(opaque, &contents, sizeof contents);
  return CUBLAS_STATUS_SUCCESS;
}
template <class Contents, class Opaque>
cublasStatus_t create(Opaque** opaque, const Contents& contents) {
  if (opaque == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  *opaque = new Opaque{};
  return initialize(*opaque, sizeof(Opaque), contents);
}

Operation fresh_operation(cublasComputeType_t compute, cudaDataType_t scale) {
  return {compute,
          scale,
          CUBLASLT_POINTER_MODE_HOST,
          CUBLAS_OP_N,
          CUBLAS_OP_N,
          CUBLAS_OP_N,
          CUBLAS_FILL_MODE_FULL,
          CUBLASLT_EPILOGUE_DEFAULT,
          nullptr,
          0,
          0,
          -1,
          0};
}
Layout fresh_layout(cudaDataType type, uint64_t rows, uint64_t columns, int64_t leading) {
  return {type, CUBLASLT_ORDER_COL, rows, columns, leading, 1, 0};
}

}  // namespace

Preference fresh_preference() {
  return {CUBLASLT_SEARCH_BEST_FIT, 0, CUBLASLT_REDUCTION_SCHEME_MASK, {256, 256, 256, 256}, 0, ~uint64_t{0}};
}

}  // namespace mesa::emulation

using namespace mesa::emulation;

extern "C" {

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  if (handle == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess) return CUBLAS_STATUS_NOT_INITIALIZED;
  *handle = new cublasLtContext;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  if (handle == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  delete handle;
  return CUBLAS_STATUS_SUCCESS;
}
size_t cublasLtGetVersion() { return CUBLAS_VERSION; }
size_t cublasLtGetCudartVersion() { return CUDART_VERSION; }

const char* cublasLtGetStatusName(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS: return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_ALLOC_FAILED: return "CUBLAS_STATUS_ALLOC_FAILED";
    case CUBLAS_STATUS_INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
    case CUBLAS_STATUS_NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
    default: return "unrecognized status";
  }
}
const char* cublasLtGetStatusString(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS: return "success";
    case CUBLAS_STATUS_NOT_INITIALIZED: return "the library was not initialized";
    case CUBLAS_STATUS_ALLOC_FAILED: return "the resource allocation failed";
    case CUBLAS_STATUS_INVALID_VALUE: return "an unsupported value or parameter was passed to the function";
    case CUBLAS_STATUS_EXECUTION_FAILED: return "the function failed to launch on the GPU";
    case CUBLAS_STATUS_NOT_SUPPORTED: return "the requested functionality is not supported";
    default: return "unrecognized status";
  }
}

// --- descriptors ------------------------------------------------------------------------------------------------------------------

cublasStatus_t cublasLtMatmulDescInit_internal(cublasLtMatmulDesc_t d, size_t bytes, cublasComputeType_t compute, cudaDataType_t scale) {
  return initialize(d, bytes, fresh_operation(compute, scale));
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* d, cublasComputeType_t compute, cudaDataType_t scale) {
  return create(d, fresh_operation(compute, scale));
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) {
  delete d;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t attribute, const void* from,
                                              size_t bytes) {
  return set_attribute(d, kOperationFields, attribute, from, bytes);
}
cublasStatus_t cublasLtMatmulDescGetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t attribute, void* to, size_t bytes,
                                              size_t* written) {
  return get_attribute(d, kOperationFields, attribute, to, bytes, written);
}

cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayout_t l, size_t bytes, cudaDataType type, uint64_t rows, uint64_t columns,
                                                 int64_t leading) {
  return initialize(l, bytes, fresh_layout(type, rows, columns, leading));
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* l, cudaDataType type, uint64_t rows, uint64_t columns, int64_t leading) {
  return create(l, fresh_layout(type, rows, columns, leading));
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) {
  delete l;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t l, cublasLtMatrixLayoutAttribute_t attribute, const void* from,
                                                size_t bytes) {
  return set_attribute(l, kLayoutFields, attribute, from, bytes);
}
cublasStatus_t cublasLtMatrixLayoutGetAttribute(cublasLtMatrixLayout_t l, cublasLtMatrixLayoutAttribute_t attribute, void* to, size_t bytes,
                                                size_t* written) {
  return get_attribute(l, kLayoutFields, attribute, to, bytes, written);
}

cublasStatus_t cublasLtMatmulPreferenceInit_internal(cublasLtMatmulPreference_t p, size_t bytes) {
  return initialize(p, bytes, fresh_preference());
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* p) { return create(p, fresh_preference()); }
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) {
  delete p;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void* from, size_t bytes) {
  return set_attribute(p, kPreferenceFields, attribute, from, bytes);
}
cublasStatus_t cublasLtMatmulPreferenceGetAttribute(cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t attribute, void* to,
                                                    size_t bytes, size_t* written) {
  return get_attribute(p, kPreferenceFields, attribute, to, bytes, written);
}

}  // extern "C"
