// The CUDA runtime's functions that Mesa calls, on emulated memory: errors, the device, memory and copies; streams.cpp has the rest.
// MESA_EMULATION_DEVICE=no_driver, old_driver, no_gpu, old_gpu, no_code, busy or no_products is a machine that cannot run Mesa;
// MESA_EMULATION_GPUS=4 one with four GPUs.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "device_memory.h"
#include "mesa/base/cuda.h"
#include "mesa/base/error.h"
#include "streams.h"

namespace mesa::emulation {
namespace {

thread_local cudaError_t last_error = cudaSuccess;

template <class... Parts>
cudaError_t invalid(const char* function, const Parts&... parts) {
  std::fprintf(stderr, "emulation: %s: %s\n", function, concat(parts...).c_str());
  return result(cudaErrorInvalidValue);
}

// --- copies -----------------------------------------------------------------------------------------------------------------------

/// Pinned blocks: their starts and bytes.
std::map<const char*, size_t>& pinned_blocks() {
  static std::map<const char*, size_t>& all = *new std::map<const char*, size_t>;
  return all;
}

bool pinned(const void* memory, size_t bytes) {
  const auto* at = static_cast<const char*>(memory);
  const auto after = pinned_blocks().upper_bound(at);
  return after != pinned_blocks().begin() && at + bytes <= std::prev(after)->first + std::prev(after)->second;
}

/// "" or why these addresses are no such memory.
std::string misplaced(const void* memory, size_t bytes, bool device) {
  if (device && !on_device(memory, 1)) return concat("address ", memory, " is not on the device");
  if (device && !allocated_on_device(memory, bytes)) return concat(bytes, " bytes from ", memory, " are not all allocated");
  if (!device && (memory == nullptr || on_device(memory, bytes))) return concat("address ", memory, " is not on the host");
  return "";
}

std::function<void(size_t)> told_of_copies;

cudaError_t copy(const char* function, void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t handle, bool wait) {
  const std::lock_guard lock(streams().mutex);
  if (kind == cudaMemcpyDefault)
    kind = on_device(to, 1) ? (on_device(from, 1) ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice)
                            : (on_device(from, 1) ? cudaMemcpyDeviceToHost : cudaMemcpyHostToHost);
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  Stream* const stream = stream_of(handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (alive() != cudaSuccess) return alive();
  if (bytes == 0) return cudaSuccess;
  if (told_of_copies) told_of_copies(bytes);
  if (const std::string why = misplaced(to, bytes, to_device); !why.empty()) return invalid(function, "to: ", why);
  if (const std::string why = misplaced(from, bytes, from_device); !why.empty()) return invalid(function, "from: ", why);
  const bool pageable = (!from_device && !pinned(from, bytes)) || (!to_device && !pinned(to, bytes));
  if (stream->recording && (wait || pageable)) return spoil(*stream);
  if (!to_device && !from_device) {
    finish(*stream);
    std::memcpy(to, from, bytes);
    return cudaSuccess;
  }
  if (!from_device && !pinned(from, bytes)) {  // pageable memory is read before the call returns
    const auto* bytes_of = static_cast<const char*>(from);
    enqueue(*stream, [to, taken = std::vector<char>(bytes_of, bytes_of + bytes)] { std::memcpy(to, taken.data(), taken.size()); });
  } else {
    enqueue(*stream, [=] { std::memmove(to, from, bytes); });
  }
  if (wait || (!to_device && !pinned(to,
                                     bytes))) {  // pageable memory is written before the call returns
    finish(*stream);
    return state_of_device();
  }
  return cudaSuccess;
}

cudaError_t fill(const char* function, void* to, int value, size_t bytes, cudaStream_t handle) {
  const std::lock_guard lock(streams().mutex);
  Stream* const stream = stream_of(handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (alive() != cudaSuccess) return alive();
  if (bytes == 0) return cudaSuccess;
  if (const std::string why = misplaced(to, bytes, true); !why.empty()) return invalid(function, why);
  enqueue(*stream, [=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}

// --- the device -------------------------------------------------------------------------------------------------------------------

enum class Machine { whole, no_driver, old_driver, no_gpu, old_gpu, no_code, busy, no_products };

Machine machine() {
  const char* const wish = std::getenv("MESA_EMULATION_DEVICE");
  if (wish == nullptr || *wish == 0) return Machine::whole;
  static const std::map<std::string, Machine> machines{{"no_driver", Machine::no_driver},    {"old_driver", Machine::old_driver},
                                                       {"no_gpu", Machine::no_gpu},          {"old_gpu", Machine::old_gpu},
                                                       {"no_code", Machine::no_code},        {"busy", Machine::busy},
                                                       {"no_products", Machine::no_products}};
  const auto found = machines.find(wish);
  check(found != machines.end(), "MESA_EMULATION_DEVICE is '", wish,
        "'; it may be no_driver, old_driver, no_gpu, old_gpu, no_code, busy or no_products");
  return found->second;
}

/// The GPUs that this process sees, by their numbers in a machine of MESA_EMULATION_GPUS (one if that is not set). As CUDA does it:
/// CUDA_VISIBLE_DEVICES is read once, when the first function is called, and its list ends where there is no such GPU.
const std::vector<int>& gpus() {
  static const std::vector<int> seen = [] {
    const char *const in_machine = std::getenv("MESA_EMULATION_GPUS"), *const list = std::getenv("CUDA_VISIBLE_DEVICES");
    const int count = in_machine ? std::atoi(in_machine) : 1;
    std::vector<int> all;
    if (list == nullptr)
      for (int i = 0; i < count; ++i) all.push_back(i);
    else
      for (const char* at = list; *at != 0;) {
        char* end = nullptr;
        const auto gpu = static_cast<int>(std::strtol(at, &end, 10));
        if (end == at || gpu < 0 || gpu >= count) break;
        all.push_back(gpu);
        at = *end == ',' ? end + 1 : "";
      }
    return all;
  }();
  return seen;
}

struct Words {
  cudaError_t status;
  const char *name, *text;
};
constexpr Words kWords[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver", "CUDA driver version is insufficient for CUDA runtime version"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice", "no kernel image is available for execution on the device"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorIllegalState, "cudaErrorIllegalState", "the operation cannot be performed in the present state"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated", "operation failed due to a previous error during capture"},
};
const Words* words_of(cudaError_t status) {
  const auto* found = std::find_if(std::begin(kWords), std::end(kWords), [&](const Words& w) { return w.status == status; });
  return found == std::end(kWords) ? nullptr : found;
}

}  // namespace

void tell_of_copies(std::function<void(size_t)> whom) { told_of_copies = std::move(whom); }

cudaError_t result(cudaError_t status) {
  if (status != cudaSuccess) last_error = status;
  return status;
}

cudaError_t ready() {
  if (machine() == Machine::no_gpu || gpus().empty()) return result(cudaErrorNoDevice);
  if (machine() == Machine::no_driver || machine() == Machine::old_driver) return result(cudaErrorInsufficientDriver);
  return cudaSuccess;
}

bool kernel_may_use(const void* memory) {
  const std::lock_guard lock(streams().mutex);
  if (memory == nullptr || device_use().used == 0 || pinned(memory, 0)) return true;
  return allocated_on_device(memory, 0);
}

}  // namespace mesa::emulation

std::string mesa::cuda::detail::find_products() {
  return emulation::machine() == emulation::Machine::no_products ? "cuBLAS was not found" : "";
}

using namespace mesa::emulation;

extern "C" {

// --- errors -----------------------------------------------------------------------------------------------------------------------

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorName(cudaError_t status) { return words_of(status) ? words_of(status)->name : "unrecognized error code"; }
const char* cudaGetErrorString(cudaError_t status) { return words_of(status) ? words_of(status)->text : "unrecognized error code"; }

// --- the device -------------------------------------------------------------------------------------------------------------------

cudaError_t cudaDriverGetVersion(int* version) {
  *version = machine() == Machine::no_driver ? 0 : machine() == Machine::old_driver ? 12000 : CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = ready() == cudaSuccess ? static_cast<int>(gpus().size()) : 0;
  return ready();
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return ready();
}
cudaError_t cudaSetDevice(int device) {  // a process uses its first one
  if (ready() != cudaSuccess) return ready();
  return device == 0 ? cudaSuccess : result(cudaErrorInvalidDevice);
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (cudaSetDevice(device) != cudaSuccess) return last_error;
  *properties = {};
  cudaDeviceProp& p = *properties;
  std::strcpy(p.name, "emulated");
  p.pciBusID = gpus().front();
  p.major = machine() == Machine::old_gpu ? 7 : 9;
  p.totalGlobalMem = device_use().limit;
  p.multiProcessorCount = 132;
  p.warpSize = 32;
  p.maxThreadsPerBlock = 1024;
  p.maxThreadsPerMultiProcessor = 2048;
  p.maxBlocksPerMultiProcessor = 32;
  p.maxThreadsDim[0] = p.maxThreadsDim[1] = 1024;
  p.maxThreadsDim[2] = 64;
  p.maxGridSize[0] = 0x7fffffff;
  p.maxGridSize[1] = p.maxGridSize[2] = 65535;
  p.regsPerBlock = p.regsPerMultiprocessor = 65536;
  p.sharedMemPerBlock = 48 << 10;
  p.sharedMemPerBlockOptin = 227 << 10;
  p.sharedMemPerMultiprocessor = 228 << 10;
  p.reservedSharedMemPerBlock = 1 << 10;
  p.totalConstMem = 64 << 10;
  p.l2CacheSize = 50 << 20;
  p.unifiedAddressing = p.canMapHostMemory = p.concurrentKernels = p.streamPrioritiesSupported = 1;
  p.asyncEngineCount = 3;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp p{};
  if (const cudaError_t status = cudaGetDeviceProperties(&p, device); status != cudaSuccess) return status;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = static_cast<int>(p.sharedMemPerBlock); break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(p.sharedMemPerBlockOptin); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = static_cast<int>(p.sharedMemPerMultiprocessor); break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    default: return invalid("cudaDeviceGetAttribute", "attribute ", static_cast<int>(attribute), " is not emulated");
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  const std::lock_guard lock(streams().mutex);
  finish_all();
  return state_of_device();
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && (value < 0 || value > 227 << 10))
    return invalid("cudaFuncSetAttribute", value, " bytes of shared memory for a block");
  return ready();
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  attributes->maxDynamicSharedSizeBytes = 48 << 10;
  if (machine() == Machine::old_gpu || machine() == Machine::no_code) return result(cudaErrorNoKernelImageForDevice);
  if (machine() == Machine::busy) return result(cudaErrorMemoryAllocation);
  return ready();
}

// --- memory -----------------------------------------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = nullptr;
  if (bytes == 0 || ready() != cudaSuccess) return ready();
  const std::lock_guard lock(streams().mutex);
  *memory = allocate_device(bytes);
  return *memory ? cudaSuccess : result(cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void* memory) {
  if (memory == nullptr) return ready();
  const std::lock_guard lock(streams().mutex);
  if (alive() != cudaSuccess) return alive();
  return free_device(memory) ? cudaSuccess : invalid("cudaFree", "no block begins at ", memory);
}
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  *memory = nullptr;
  if (bytes == 0 || ready() != cudaSuccess) return ready();
  *memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  if (*memory == nullptr) return result(cudaErrorMemoryAllocation);
  const std::lock_guard lock(streams().mutex);
  pinned_blocks()[static_cast<char*>(*memory)] = bytes;
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void** memory, size_t bytes) { return cudaHostAlloc(memory, bytes, cudaHostAllocDefault); }
cudaError_t cudaFreeHost(void* memory) {
  if (memory == nullptr) return ready();
  const std::lock_guard lock(streams().mutex);
  if (pinned_blocks().erase(static_cast<char*>(memory)) == 0) return invalid("cudaFreeHost", "no pinned block begins at ", memory);
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const DeviceUse use = device_use();
  *free = use.limit - std::min(use.limit, use.used);
  *total = use.limit;
  return ready();
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return copy("cudaMemcpyAsync", to, from, bytes, kind, stream, false);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return copy("cudaMemcpy", to, from, bytes, kind, nullptr, true);
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return fill("cudaMemsetAsync", to, value, bytes, stream);
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) { return fill("cudaMemset", to, value, bytes, nullptr); }

}  // extern "C"
