// cuDNN is opened when it is first asked for: what Mesa calls of it, passed on.
#include <cudnn.h>

#include "shared_library.h"

namespace {

using mesa::kernels::cuda::SharedLibrary;

/// Its first call opens the part for graphs, and ends the process where that is missing: so it is looked for before.
const SharedLibrary& library() {
  static const auto& graphs = *new SharedLibrary("libcudnn_graph.so.9");
  static const auto& once = graphs.handle != nullptr ? *new SharedLibrary("libcudnn.so.9") : graphs;
  return once;
}

}  // namespace

extern "C" {

#define PASS_ON(...) MESA_PASS_ON(library(), CUDNN_STATUS_NOT_SUPPORTED, __VA_ARGS__)

PASS_ON(cudnnCreate, (cudnnHandle_t * handle), (handle))
PASS_ON(cudnnSetStream, (cudnnHandle_t handle, cudaStream_t stream), (handle, stream))
PASS_ON(cudnnBackendCreateDescriptor, (cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t* out), (type, out))
PASS_ON(cudnnBackendDestroyDescriptor, (cudnnBackendDescriptor_t descriptor), (descriptor))
PASS_ON(cudnnBackendFinalize, (cudnnBackendDescriptor_t descriptor), (descriptor))
PASS_ON(cudnnBackendSetAttribute,
        (cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t count,
         const void* values),
        (descriptor, name, type, count, values))
PASS_ON(cudnnBackendGetAttribute,
        (const cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t room,
         int64_t* count, void* values),
        (descriptor, name, type, room, count, values))
PASS_ON(cudnnBackendExecute, (cudnnHandle_t handle, cudnnBackendDescriptor_t plan, cudnnBackendDescriptor_t pack), (handle, plan, pack))

MESA_PASS_ON(library(), size_t{0}, cudnnGetVersion, (), ())
MESA_PASS_ON(library(), size_t{0}, cudnnGetCudartVersion, (), ())
MESA_PASS_ON(library(), library().why.c_str(), cudnnGetErrorString, (cudnnStatus_t status), (status))

MESA_HIDDEN void cudnnGetLastErrorString(char* message, size_t size) {
  static const auto there = library().find<decltype(cudnnGetLastErrorString)>("cudnnGetLastErrorString");
  if (there != nullptr)
    there(message, size);
  else if (size > 0)
    *message = 0;
}

}  // extern "C"
