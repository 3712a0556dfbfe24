// Whether this library holds code for the GPU at hand: asked of one kernel, before any other starts.
#include <device_primitives.h>

namespace mesa::cuda::detail {

namespace {
__global__ void probe() {}
}  // namespace

int probe_status() {
  cudaFuncAttributes attributes{};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&probe));
  cudaGetLastError();  // the answer is not an error of whoever comes next
  return status;
}

}  // namespace mesa::cuda::detail
