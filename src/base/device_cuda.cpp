// The CUDA runtime behind mesa/base/cuda.h.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <mutex>
#include <utility>
#include <vector>

#include "mesa/base/cuda.h"
#include "mesa/base/error.h"

namespace mesa::cuda {

namespace {

std::string version_text(int version) { return concat(version / 1000, ".", version % 1000 / 10); }

cudaStream_t new_stream() {
  cudaStream_t s = nullptr;
  check_status(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), "creating a stream");
  return s;
}

cudaStream_t compute_stream() { return static_cast<cudaStream_t>(stream()); }

/// Where nothing can be thrown, an error is told, once.
void report_status(cudaError_t status, const char* what) {
  static bool told = false;
  if (status == cudaSuccess || status == cudaErrorCudartUnloading || std::exchange(told, true)) return;
  std::fprintf(stderr, "warning: cuda: %s: %s\n", what, cudaGetErrorString(status));
}

}  // namespace

std::string toolkit_version() { return version_text(CUDART_VERSION); }

std::string detail::find_device() {
  int devices = 0, driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaErrorInsufficientDriver && driver == 0) return "no NVIDIA driver is installed";
  if (status == cudaErrorInsufficientDriver)
    return concat("the NVIDIA driver supports CUDA ", version_text(driver), ", but this build needs ", version_text(CUDART_VERSION),
                  "; update the driver");
  if (status == cudaErrorNoDevice || (status == cudaSuccess && devices == 0)) {
    const char* const visible = std::getenv("CUDA_VISIBLE_DEVICES");
    if (visible == nullptr) return "no NVIDIA GPU was found";
    return concat("no NVIDIA GPU was found: CUDA_VISIBLE_DEVICES, which ranks of a host set to a GPU of their own, is '", visible, "'");
  }
  if (status != cudaSuccess) return concat("CUDA does not start: ", cudaGetErrorString(status));
  cudaDeviceProp properties{};
  if (const cudaError_t error = cudaGetDeviceProperties(&properties, 0); error != cudaSuccess)
    return concat("the GPU does not answer: ", cudaGetErrorString(error));
  if (properties.major < 8)
    return concat(properties.name, " has compute capability ", properties.major, ".", properties.minor, "; Mesa needs 8.0 or newer");
  const auto error = static_cast<cudaError_t>(probe_status());  // the first call that starts the GPU for this process
  const auto any_of = [error](std::initializer_list<cudaError_t> of) { return std::find(of.begin(), of.end(), error) != of.end(); };
  if (any_of({cudaErrorNoKernelImageForDevice, cudaErrorInvalidDeviceFunction, cudaErrorUnsupportedPtxVersion, cudaErrorInvalidPtx,
              cudaErrorInvalidKernelImage, cudaErrorJitCompilerNotFound, cudaErrorJitCompilationDisabled}))
    return concat("this build has no code for ", properties.name, " (compute capability ", properties.major, ".", properties.minor,
                  "); build with -DCMAKE_CUDA_ARCHITECTURES=", properties.major, properties.minor, " (", cudaGetErrorString(error), ")");
  if (error != cudaSuccess)
    return concat(properties.name, " cannot be used: ", cudaGetErrorString(error),
                  any_of({cudaErrorMemoryAllocation, cudaErrorDevicesUnavailable}) ? "; nvidia-smi says who uses it, and how" : "");
  return find_products();
}

void check_status(int status, const char* what) {
  if (status == cudaSuccess) return;
  const auto error = static_cast<cudaError_t>(status);
  if (error == cudaErrorMemoryAllocation)  // what the driver wanted beside the allocator, as for a kernel's code when it is first run
    throw OutOfMemory(concat("out of memory on cuda: ", what, ": the driver found none for itself"));
  fail("cuda: ", what, ": ", cudaGetErrorString(error), " (", cudaGetErrorName(error), ")");
}

bool synchronous() {
  static const bool on = [] {
    const char* wish = std::getenv("MESA_SYNC");
    return wish != nullptr && std::strcmp(wish, "1") == 0;
  }();
  return on;
}

void* stream() {
  // Not blocking: the legacy default stream, which libraries may use, would make it wait.
  static const cudaStream_t one = new_stream();
  return one;
}

void synchronize(const char* what) { check_status(cudaStreamSynchronize(compute_stream()), what); }

void* allocate(int64_t bytes) {
  void* memory = nullptr;
  const cudaError_t status = cudaMalloc(&memory, static_cast<size_t>(bytes));
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // not sticky: the caller frees something and tries again
    return nullptr;
  }
  check_status(status, "cudaMalloc");
  return memory;
}

/// cudaFree may wait for the work that uses the memory, and need not. What copies beside the work use is held until they are done.
void release(void* memory) {
  report_status(cudaStreamSynchronize(compute_stream()), "waiting before cudaFree");
  report_status(cudaFree(memory), "cudaFree");
}

void* allocate_pinned(int64_t bytes) {
  void* memory = nullptr;
  const cudaError_t status = cudaHostAlloc(&memory, static_cast<size_t>(bytes), cudaHostAllocDefault);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return nullptr;
  }
  check_status(status, "cudaHostAlloc");
  return memory;
}

void release_pinned(void* memory) {
  report_status(cudaStreamSynchronize(compute_stream()), "waiting before cudaFreeHost");
  report_status(cudaFreeHost(memory), "cudaFreeHost");
}

void copy_to_device(void* device, const void* host, int64_t bytes) {
  if (bytes == 0) return;
  check_status(cudaMemcpyAsync(device, host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, compute_stream()), "copying to the GPU");
}

void copy_to_host(void* host, const void* device, int64_t bytes) {
  if (bytes == 0) return;
  check_status(cudaMemcpyAsync(host, device, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, compute_stream()), "copying from the GPU");
  synchronize();
}

void copy_on_device(void* to, const void* from, int64_t bytes) {
  if (bytes == 0) return;
  check_status(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, compute_stream()), "copying on the GPU");
}

void clear(void* device, int64_t bytes) {
  check_status(cudaMemsetAsync(device, 0, static_cast<size_t>(bytes), compute_stream()), "clearing memory");
}

namespace {

/// Events are dear to make; a mark's goes back here.
struct EventPool {
  std::mutex mutex;
  std::vector<cudaEvent_t> free;

  static EventPool& get() {
    static EventPool& pool = *new EventPool;  // marks may outlive any order of destruction
    return pool;
  }
  cudaEvent_t take() {
    const std::lock_guard lock(mutex);
    if (!free.empty()) {
      const cudaEvent_t event = free.back();
      free.pop_back();
      return event;
    }
    cudaEvent_t event = nullptr;
    check_status(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "creating an event");
    return event;
  }
};

Mark mark_on(cudaStream_t stream) {
  const cudaEvent_t event = EventPool::get().take();
  Mark mark(event, [](void* used) {
    EventPool& pool = EventPool::get();
    const std::lock_guard lock(pool.mutex);
    pool.free.push_back(static_cast<cudaEvent_t>(used));
  });
  check_status(cudaEventRecord(event, stream), "marking a stream");
  return mark;
}

Mark copy_beside(cudaStream_t side, void* to, const void* from, int64_t bytes, cudaMemcpyKind kind, const Mark& after) {
  const Mark ready = after ? after : mark_on(compute_stream());
  check_status(cudaStreamWaitEvent(side, static_cast<cudaEvent_t>(ready.get()), 0), "waiting for the work before a copy");
  if (bytes > 0) check_status(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), kind, side), "copying beside the work");
  return mark_on(side);
}

}  // namespace

Mark mark() { return mark_on(compute_stream()); }

Mark copy_to_host_beside(void* host, const void* device, int64_t bytes) {
  static const cudaStream_t side = new_stream();
  return copy_beside(side, host, device, bytes, cudaMemcpyDeviceToHost, {});
}

Mark copy_to_device_beside(void* device, const void* host, int64_t bytes, const Mark& after) {
  static const cudaStream_t side = new_stream();
  return copy_beside(side, device, host, bytes, cudaMemcpyHostToDevice, after);
}

bool passed(const Mark& mark) {
  const cudaError_t status = cudaEventQuery(static_cast<cudaEvent_t>(mark.get()));
  if (status != cudaErrorNotReady) check_status(status, "asking for a copy");
  return status == cudaSuccess;
}

void wait_for(const Mark& mark) {
  check_status(cudaStreamWaitEvent(compute_stream(), static_cast<cudaEvent_t>(mark.get()), 0), "waiting for a copy");
}

namespace {
std::atomic<bool> is_recording = false;  // also asked by threads that load pictures
}

void begin_recording() {
  check_status(cudaStreamBeginCapture(compute_stream(), cudaStreamCaptureModeRelaxed), "beginning to record work");  // memory may be taken
  is_recording = true;
}

bool recording() { return is_recording; }

Recording end_recording(bool keep) {
  is_recording = false;
  cudaGraph_t graph = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(compute_stream(), &graph);
  cudaGraphExec_t ready = nullptr;
  const cudaError_t made = keep && ended == cudaSuccess ? cudaGraphInstantiate(&ready, graph, 0) : cudaSuccess;
  if (graph != nullptr) report_status(cudaGraphDestroy(graph), "dropping a graph");
  if (!keep) {
    cudaGetLastError();  // whatever broke the recording is reported by whoever drops it
    return {};
  }
  check_status(ended, "recording work");
  check_status(made, "preparing recorded work");
  return {ready,
          [](void* recording) { report_status(cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(recording)), "dropping recorded work"); }};
}

void run(const Recording& recording) {
  check_status(cudaGraphLaunch(static_cast<cudaGraphExec_t>(recording.get()), compute_stream()), "running recorded work");
}

std::string describe_device() {
  cudaDeviceProp properties{};
  check_status(cudaGetDeviceProperties(&properties, 0), "asking for the GPU's properties");
  int driver = 0;
  check_status(cudaDriverGetVersion(&driver), "asking for the driver's version");
  return concat(properties.name, ", compute capability ", properties.major, ".", properties.minor, ", driver for CUDA ",
                version_text(driver));
}

DeviceMemory device_memory() {
  size_t free = 0, total = 0;
  check_status(cudaMemGetInfo(&free, &total), "asking for the GPU's memory");
  return {static_cast<int64_t>(free), static_cast<int64_t>(total)};
}

}  // namespace mesa::cuda
