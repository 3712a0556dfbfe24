// cuDNN is opened when it is first asked for, so that programs start on machines that lack it: what Mesa calls of it, passed on. Hidden,
// since cuDNN's own libraries have to find cuDNN's functions and not these.
#include <cudnn.h>
#include <dlfcn.h>

#include <cstddef>
#include <string>

namespace {

struct Opened {
  void* library = dlopen("libcudnn.so.9", RTLD_NOW | RTLD_LOCAL);
  std::string why = library != nullptr ? "" : dlerror();
};
const Opened& opened() {
  static const Opened& once = *new Opened;
  return once;
}

template <class F>
F* find(const char* name) {
  return opened().library == nullptr ? nullptr : reinterpret_cast<F*>(dlsym(opened().library, name));
}

}  // namespace

extern "C" {

#define MESA_HIDDEN [[gnu::visibility("hidden")]]
#define MESA_PASS_ON(name, parameters, arguments)                           \
  MESA_HIDDEN cudnnStatus_t name parameters {                               \
    static decltype(&name) const there = find<decltype(name)>(#name);       \
    return there != nullptr ? there arguments : CUDNN_STATUS_NOT_SUPPORTED; \
  }

MESA_PASS_ON(cudnnCreate, (cudnnHandle_t * handle), (handle))
MESA_PASS_ON(cudnnSetStream, (cudnnHandle_t handle, cudaStream_t stream), (handle, stream))
MESA_PASS_ON(cudnnBackendCreateDescriptor, (cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t* out), (type, out))
MESA_PASS_ON(cudnnBackendDestroyDescriptor, (cudnnBackendDescriptor_t descriptor), (descriptor))
MESA_PASS_ON(cudnnBackendFinalize, (cudnnBackendDescriptor_t descriptor), (descriptor))
MESA_PASS_ON(cudnnBackendSetAttribute,
             (cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t count,
              const void* values),
             (descriptor, name, type, count, values))
MESA_PASS_ON(cudnnBackendGetAttribute,
             (const cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t room,
              int64_t* count, void* values),
             (descriptor, name, type, room, count, values))
MESA_PASS_ON(cudnnBackendExecute, (cudnnHandle_t handle, cudnnBackendDescriptor_t plan, cudnnBackendDescriptor_t pack),
             (handle, plan, pack))

/// 0 where cuDNN is not there.
MESA_HIDDEN size_t cudnnGetVersion() {
  static const auto there = find<decltype(cudnnGetVersion)>("cudnnGetVersion");
  return there != nullptr ? there() : 0;
}

MESA_HIDDEN const char* cudnnGetErrorString(cudnnStatus_t status) {
  static const auto there = find<decltype(cudnnGetErrorString)>("cudnnGetErrorString");
  return there != nullptr ? there(status) : opened().why.c_str();
}

MESA_HIDDEN void cudnnGetLastErrorString(char* message, size_t size) {
  static const auto there = find<decltype(cudnnGetLastErrorString)>("cudnnGetLastErrorString");
  if (there != nullptr)
    there(message, size);
  else if (size > 0)
    *message = 0;
}

}  // extern "C"
