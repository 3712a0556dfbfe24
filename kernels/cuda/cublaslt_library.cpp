// cuBLASLt is opened when it is first asked for: what Mesa calls of it, passed on.
#include <cublasLt.h>

#include "mesa/base/cuda.h"
#include "mesa/base/error.h"
#include "shared_library.h"

namespace {

const mesa::kernels::cuda::SharedLibrary& library() {
  static const auto& once = *new mesa::kernels::cuda::SharedLibrary(mesa::concat("libcublasLt.so.", CUBLAS_VER_MAJOR));
  return once;
}

}  // namespace

std::string mesa::cuda::detail::find_products() {
  if (library().why.empty()) return "";
  return concat("cuBLAS was not found (", library().why, "); install that of CUDA ", CUBLAS_VER_MAJOR,
                ", or name its folder in LD_LIBRARY_PATH");
}

extern "C" {

#define PASS_ON(...) MESA_PASS_ON(library(), CUBLAS_STATUS_NOT_SUPPORTED, __VA_ARGS__)

PASS_ON(cublasLtCreate, (cublasLtHandle_t * handle), (handle))
PASS_ON(cublasLtMatrixLayoutCreate, (cublasLtMatrixLayout_t * out, cudaDataType type, uint64_t rows, uint64_t columns, int64_t stride),
        (out, type, rows, columns, stride))
PASS_ON(cublasLtMatrixLayoutDestroy, (cublasLtMatrixLayout_t layout), (layout))
PASS_ON(cublasLtMatrixLayoutSetAttribute,
        (cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t name, const void* value, size_t bytes),
        (layout, name, value, bytes))
PASS_ON(cublasLtMatmulDescCreate, (cublasLtMatmulDesc_t * out, cublasComputeType_t compute, cudaDataType_t scale), (out, compute, scale))
PASS_ON(cublasLtMatmulDescDestroy, (cublasLtMatmulDesc_t operation), (operation))
PASS_ON(cublasLtMatmulDescSetAttribute,
        (cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t name, const void* value, size_t bytes),
        (operation, name, value, bytes))
PASS_ON(cublasLtMatmulPreferenceCreate, (cublasLtMatmulPreference_t * out), (out))
PASS_ON(cublasLtMatmulPreferenceDestroy, (cublasLtMatmulPreference_t preference), (preference))
PASS_ON(cublasLtMatmulPreferenceSetAttribute,
        (cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t name, const void* value, size_t bytes),
        (preference, name, value, bytes))
PASS_ON(cublasLtMatmulAlgoGetHeuristic,
        (cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
         cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference, int most,
         cublasLtMatmulHeuristicResult_t* results, int* found),
        (handle, operation, a, b, c, d, preference, most, results, found))
PASS_ON(cublasLtMatmulAlgoConfigGetAttribute,
        (const cublasLtMatmulAlgo_t* algorithm, cublasLtMatmulAlgoConfigAttributes_t name, void* value, size_t bytes, size_t* written),
        (algorithm, name, value, bytes, written))
PASS_ON(cublasLtMatmulAlgoCheck,
        (cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
         cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t* algorithm,
         cublasLtMatmulHeuristicResult_t* result),
        (handle, operation, a, b, c, d, algorithm, result))
PASS_ON(cublasLtMatmul,
        (cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, const void* alpha, const void* a, cublasLtMatrixLayout_t layout_a,
         const void* b, cublasLtMatrixLayout_t layout_b, const void* beta, const void* c, cublasLtMatrixLayout_t layout_c, void* d,
         cublasLtMatrixLayout_t layout_d, const cublasLtMatmulAlgo_t* algorithm, void* workspace, size_t workspace_bytes,
         cudaStream_t stream),
        (handle, operation, alpha, a, layout_a, b, layout_b, beta, c, layout_c, d, layout_d, algorithm, workspace, workspace_bytes, stream))

MESA_PASS_ON(library(), size_t{0}, cublasLtGetVersion, (), ())
MESA_PASS_ON(library(), library().why.c_str(), cublasLtGetStatusString, (cublasStatus_t status), (status))

}  // extern "C"
