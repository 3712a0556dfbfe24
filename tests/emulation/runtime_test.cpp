// The emulated CUDA runtime: memory that the host cannot touch, copies that are checked, streams that wait until someone waits for them.
#include <catch2/catch.hpp>
#include <cstring>

#include "device_memory.h"
#include "device_primitives.h"
#include "emulated.h"
#include "mesa/base/cuda.h"
#include "streams.h"
#include "support/errors.h"

using namespace mesa;
using namespace mesa::testing;
using namespace mesa::kernels::cuda;
using Catch::Matchers::Contains;

namespace {

__global__ void add_one(int* x, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) x[i] += 1;
}
__global__ void write_at(char* x, int64_t at) { x[at] = 0; }

/// Pinned host memory.
template <class T>
struct Pinned {
  explicit Pinned(const std::vector<T>& values) {
    if (cudaHostAlloc(reinterpret_cast<void**>(&data), values.size() * sizeof(T), cudaHostAllocDefault) != cudaSuccess) std::abort();
    std::memcpy(data, values.data(), values.size() * sizeof(T));
  }
  ~Pinned() { cudaFreeHost(data); }
  T* data = nullptr;
};

struct Stream {
  Stream() { cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking); }
  ~Stream() { cudaStreamDestroy(handle); }
  cudaStream_t handle = nullptr;
};
struct Event {
  Event() { cudaEventCreateWithFlags(&handle, cudaEventDefault); }
  ~Event() { cudaEventDestroy(handle); }
  cudaEvent_t handle = nullptr;
};

}  // namespace

TEST_CASE("emulation: kernels see device memory, the host does not", "[emulation]") {
  OnDevice<int> x{1, 2, 3};
  launch("add_one", &add_one, 1, 32, 0, x.data(), 3);
  CHECK(x.get() == std::vector<int>{2, 3, 4});
  int* const p = x.data();
  const End read = end_of([&] { std::_Exit(*const_cast<volatile int*>(p)); });
  CHECK(read.how != "exit 2");
  CHECK_THAT(read.err, Contains("emulation: host code touched device memory at 0x"));
  const End write = end_of([&] { *const_cast<volatile int*>(p) = 1; });
  CHECK(write.how != "exit 0");
  CHECK_THAT(write.err, Contains("emulation: host code touched device memory at 0x"));
#ifndef MESA_EMULATION_ASAN  // whose own report ends the process
  CHECK(read.how == "signal 11");
  CHECK(write.how == "signal 11");
#endif
  const End fault = end_of([] { raise(SIGSEGV); });  // any other fault stays what it was
  CHECK(fault.err.find("emulation") == std::string::npos);
}

TEST_CASE("emulation: device memory opens in nested scopes", "[emulation]") {
  OnDevice<int> x{5};
  const End end = end_of([&] {
    {
      const emulation::DeviceAccess outer;
      { const emulation::DeviceAccess inner; }
      if (*x.data() != 5) std::_Exit(1);
    }
    std::_Exit(*const_cast<volatile int*>(x.data()));
  });
  CHECK_THAT(end.err, Contains("host code touched device memory"));
}

TEST_CASE("emulation: a kernel gets no host pointer", "[emulation]") {
  OnDevice<int> x{1};
  int host = 1;
  CHECK_THAT(error_of([&] { launch("add_one", &add_one, 1, 32, 0, &host, 1); }),
             Contains("add_one: an argument points to the host's memory"));
  Pinned<int> pinned({1});
  launch("add_one", &add_one, 1, 32, 0, pinned.data, 1);
  CHECK(*pinned.data == 2);
}

TEST_CASE("emulation: writes outside of a block are noticed", "[emulation]") {
  OnDevice<char> x(std::vector<char>(1000));
  for (const int64_t at : {int64_t{-1}, int64_t{1000}, int64_t{1255}}) {
    CAPTURE(at);
    const End end = end_of([&] {
      launch("write_at", &write_at, 1, 1, 0, x.data(), at);
      if (cudaDeviceSynchronize() != cudaErrorIllegalAddress) std::_Exit(0);
      std::_Exit(3);
    });
    CHECK(end.how != "exit 0");
#ifdef MESA_EMULATION_ASAN
    CHECK_THAT(end.err, Contains("AddressSanitizer: use-after-poison"));
#else
    CHECK(end.how == "exit 3");
    CHECK_THAT(end.err, Contains(at < 0 ? "written before a block of 1000 bytes" : "written behind a block of 1000 bytes"));
#endif
  }
  const End beyond = end_of([&] { launch("write_at", &write_at, 1, 1, 0, x.data(), int64_t{32} << 30); });
  CHECK_THAT(beyond.err, Contains("a kernel touched device memory beyond every block"));
}

TEST_CASE("emulation: device memory is aligned, fresh and limited", "[emulation]") {
  const size_t used = emulation::device_use().used;
  emulation::set_device_limit(used + 1000);
  void *a = nullptr, *b = nullptr, *c = nullptr;
  CHECK(cudaMalloc(&a, 600) == cudaSuccess);
  CHECK(cudaMalloc(&b, 401) == cudaErrorMemoryAllocation);
  CHECK(b == nullptr);
  CHECK(cudaPeekAtLastError() == cudaErrorMemoryAllocation);
  CHECK(cudaGetLastError() == cudaErrorMemoryAllocation);
  CHECK(cudaGetLastError() == cudaSuccess);
  CHECK(cudaMalloc(&b, 400) == cudaSuccess);
  size_t free = 1, total = 0;
  CHECK(cudaMemGetInfo(&free, &total) == cudaSuccess);
  CHECK(free == 0);
  CHECK(total == used + 1000);
  for (void* p : {a, b}) CHECK(reinterpret_cast<uintptr_t>(p) % 256 == 0);
  std::vector<unsigned char> host(400);
  CHECK(cudaMemcpy(host.data(), b, 400, cudaMemcpyDeviceToHost) == cudaSuccess);
  CHECK(host == std::vector<unsigned char>(400, 0xff));
  CHECK(cudaFree(a) == cudaSuccess);
  CHECK(cudaMalloc(&c, 600) == cudaSuccess);
  CHECK(c == a);  // the gap is used again
  CHECK(cudaFree(b) == cudaSuccess);
  CHECK(cudaFree(c) == cudaSuccess);
  CHECK_THAT(said([&] { CHECK(cudaFree(c) == cudaErrorInvalidValue); }), Contains("cudaFree: no block begins at"));
  CHECK(cudaFree(nullptr) == cudaSuccess);
  CHECK(emulation::device_use().used == used);
  emulation::set_device_limit(size_t{4} << 30);
  cudaGetLastError();
}

TEST_CASE("emulation: gaps between blocks join", "[emulation]") {
  constexpr size_t kBlock = size_t{1} << 30;  // larger than any gap that other tests leave
  emulation::set_device_limit(8 * kBlock);
  std::vector<void*> blocks(4);
  for (void*& block : blocks) REQUIRE(cudaMalloc(&block, kBlock) == cudaSuccess);
  for (const int i : {2, 0, 1}) CHECK(cudaFree(blocks[i]) == cudaSuccess);
  void* large = nullptr;
  REQUIRE(cudaMalloc(&large, 3 * kBlock) == cudaSuccess);
  CHECK(large <= blocks[0]);
  CHECK(cudaFree(large) == cudaSuccess);
  CHECK(cudaFree(blocks[3]) == cudaSuccess);
  emulation::set_device_limit(size_t{4} << 30);
}

TEST_CASE("emulation: copies with pointers of the wrong kind", "[emulation]") {
  OnDevice<int> x{1, 2, 3, 4}, y{0, 0, 0, 0};
  std::vector<int> host(4);
  const auto refused = [&](void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    std::string text = said([&] { CHECK(cudaMemcpy(to, from, bytes, kind) == cudaErrorInvalidValue); });
    CHECK(cudaGetLastError() == cudaErrorInvalidValue);
    return text;
  };
  CHECK_THAT(refused(host.data(), x.data(), 16, cudaMemcpyHostToDevice), Contains("to: address") && Contains("is not on the device"));
  CHECK_THAT(refused(host.data(), y.data(), 16, cudaMemcpyHostToHost), Contains("from: address") && Contains("is not on the host"));
  CHECK_THAT(refused(x.data(), host.data(), 16, cudaMemcpyDeviceToHost), Contains("is not on the host"));
  CHECK_THAT(refused(y.data(), x.data(), 20, cudaMemcpyDeviceToDevice), Contains("20 bytes from") && Contains("are not all allocated"));
  CHECK_THAT(refused(nullptr, x.data(), 16, cudaMemcpyDeviceToHost), Contains("is not on the host"));
  CHECK(cudaMemcpy(y.data(), x.data() + 2, 8, cudaMemcpyDefault) == cudaSuccess);
  CHECK(cudaMemset(y.data() + 2, 0, 4) == cudaSuccess);
  CHECK(cudaMemcpy(host.data(), y.data(), 12, cudaMemcpyDefault) == cudaSuccess);
  CHECK(host == std::vector<int>{3, 4, 0, 0});
  CHECK_THAT(said([&] { CHECK(cudaMemset(y.data(), 0, 17) == cudaErrorInvalidValue); }), Contains("17 bytes"));
  cudaGetLastError();
}

TEST_CASE("emulation: what nobody waits for has not happened", "[emulation]") {
  OnDevice<int> x{1};
  Pinned<int> from({2}), to({0});
  Stream copies, other;
  SECTION("the host waits for the stream") {
    CHECK(cudaMemcpyAsync(x.data(), from.data, 4, cudaMemcpyHostToDevice, copies.handle) == cudaSuccess);
    *from.data = 3;  // too early: it is this that arrives
    CHECK(cudaMemcpyAsync(to.data, x.data(), 4, cudaMemcpyDeviceToHost, copies.handle) == cudaSuccess);
    CHECK(*to.data == 0);
    CHECK(x.get()[0] == 1);  // a copy on the default stream does not wait for a non-blocking one
    CHECK(cudaStreamQuery(other.handle) == cudaSuccess);
    CHECK(cudaStreamSynchronize(copies.handle) == cudaSuccess);
    CHECK(*to.data == 3);
  }
  SECTION("pageable memory is read at once and written at once") {
    std::vector<int> host{7};
    CHECK(cudaMemcpyAsync(x.data(), host.data(), 4, cudaMemcpyHostToDevice, copies.handle) == cudaSuccess);
    host[0] = 8;
    std::vector<int> back{0};
    CHECK(cudaMemcpyAsync(back.data(), x.data(), 4, cudaMemcpyDeviceToHost, copies.handle) == cudaSuccess);
    CHECK(back[0] == 7);
  }
  SECTION("a stream waits for an event of another") {
    Event event;
    CHECK(cudaEventQuery(event.handle) == cudaSuccess);  // never recorded
    CHECK(cudaMemsetAsync(x.data(), 0, 4, copies.handle) == cudaSuccess);
    CHECK(cudaEventRecord(event.handle, copies.handle) == cudaSuccess);
    CHECK(cudaMemcpyAsync(x.data(), from.data, 4, cudaMemcpyHostToDevice, copies.handle) == cudaSuccess);  // behind the event
    CHECK(cudaStreamWaitEvent(other.handle, event.handle, 0) == cudaSuccess);
    CHECK(cudaMemcpyAsync(to.data, x.data(), 4, cudaMemcpyDeviceToHost, other.handle) == cudaSuccess);
    *to.data = 9;
    CHECK(cudaStreamSynchronize(other.handle) == cudaSuccess);
    CHECK(*to.data == 0);
    CHECK(cudaStreamQuery(copies.handle) == cudaErrorNotReady);
    CHECK(cudaStreamQuery(copies.handle) == cudaSuccess);
    CHECK(x.get()[0] == 2);
  }
  SECTION("what another process takes part in is not done as soon as somebody asks") {
    bool there = false;
    emulation::enqueue(
        *emulation::stream_of(other.handle), [] {}, [&] { return there; });
    Event event;
    CHECK(cudaEventRecord(event.handle, other.handle) == cudaSuccess);
    CHECK(cudaStreamWaitEvent(copies.handle, event.handle, 0) == cudaSuccess);
    for (int i = 0; i < 3; ++i) {
      CHECK(cudaEventQuery(event.handle) == cudaErrorNotReady);
      CHECK(cudaStreamQuery(other.handle) == cudaErrorNotReady);
      CHECK(cudaStreamQuery(copies.handle) == cudaErrorNotReady);
    }
    there = true;
    CHECK(cudaStreamSynchronize(copies.handle) == cudaSuccess);
    CHECK(cudaEventQuery(event.handle) == cudaSuccess);
    CHECK(cudaStreamQuery(other.handle) == cudaSuccess);
  }
  SECTION("a kernel waits for its own stream only") {
    cuda::copy_to_device(x.data(), from.data, 4);  // pinned, on the compute stream
    CHECK(cudaMemcpyAsync(to.data, x.data(), 4, cudaMemcpyDeviceToHost, copies.handle) == cudaSuccess);
    launch("add_one", &add_one, 1, 32, 0, x.data(), 1);
    CHECK(*to.data == 0);
    CHECK(x.get()[0] == 3);
    CHECK(cudaDeviceSynchronize() == cudaSuccess);
    CHECK(*to.data == 3);
  }
  cudaGetLastError();
}

TEST_CASE("emulation: events measure time and know their state", "[emulation]") {
  Stream stream;
  Event first, second, never;
  float milliseconds = -1;
  CHECK(cudaEventRecord(first.handle, stream.handle) == cudaSuccess);
  CHECK(cudaEventRecord(second.handle, stream.handle) == cudaSuccess);
  CHECK(cudaEventElapsedTime(&milliseconds, first.handle, second.handle) == cudaErrorNotReady);
  CHECK(cudaEventQuery(first.handle) == cudaErrorNotReady);
  CHECK(cudaEventQuery(first.handle) == cudaSuccess);
  CHECK(cudaEventSynchronize(second.handle) == cudaSuccess);
  CHECK(cudaEventElapsedTime(&milliseconds, first.handle, second.handle) == cudaSuccess);
  CHECK(milliseconds >= 0);
  CHECK(cudaEventElapsedTime(&milliseconds, first.handle, never.handle) == cudaErrorInvalidResourceHandle);
  cudaEvent_t gone = nullptr;
  CHECK(cudaEventCreate(&gone) == cudaSuccess);
  CHECK(cudaEventDestroy(gone) == cudaSuccess);
  CHECK(cudaEventRecord(gone, stream.handle) == cudaErrorInvalidResourceHandle);
  cudaGetLastError();
}

TEST_CASE("emulation: the device and its errors describe themselves", "[emulation]") {
  CHECK(cuda::available());
  CHECK(cuda::describe_device() == "emulated, compute capability 9.0, driver for CUDA 13.0");
  cudaDeviceProp properties{};
  CHECK(cudaGetDeviceProperties(&properties, 0) == cudaSuccess);
  CHECK(properties.multiProcessorCount == 132);
  CHECK(properties.sharedMemPerBlockOptin == 227 << 10);
  CHECK(cudaSetDevice(1) == cudaErrorInvalidDevice);
  CHECK(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal) == cudaErrorStreamCaptureUnsupported);
  CHECK(std::string(cudaGetErrorName(cudaErrorNotSupported)) == "cudaErrorNotSupported");
  CHECK(std::string(cudaGetErrorString(cudaErrorIllegalAddress)) == "an illegal memory access was encountered");
  cudaGetLastError();
}

TEST_CASE("emulation: machines that cannot run Mesa", "[emulation]") {
  const auto reason_on = [](const char* machine) {
    return end_of([&] {
             setenv("MESA_EMULATION_DEVICE", machine, 1);
             dprintf(STDERR_FILENO, "%s", cuda::detail::find_device().c_str());
           })
        .err;
  };
  unsetenv("CUDA_VISIBLE_DEVICES");
  CHECK(reason_on("no_driver") == "no NVIDIA driver is installed");
  CHECK_THAT(reason_on("old_driver"), Contains("the NVIDIA driver supports CUDA 12.0, but this build needs 13.0"));
  CHECK(reason_on("no_gpu") == "no NVIDIA GPU was found");
  setenv("CUDA_VISIBLE_DEVICES", "7", 1);  // as the eighth rank of a host with fewer GPUs
  CHECK_THAT(reason_on("no_gpu"), Contains("no NVIDIA GPU was found: CUDA_VISIBLE_DEVICES") && Contains("is '7'"));
  unsetenv("CUDA_VISIBLE_DEVICES");
  CHECK_THAT(reason_on("old_gpu"), Contains("emulated has compute capability 7.0; Mesa needs 8.0 or newer"));
  CHECK_THAT(reason_on("no_code"), Contains("this build has no code for emulated (compute capability 9.0)"));
  CHECK_THAT(reason_on("busy"), Contains("emulated cannot be used: out of memory; nvidia-smi says who uses it"));
  CHECK(reason_on("no_products") == "cuBLAS was not found");
}
