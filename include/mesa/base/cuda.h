// The door to NVIDIA GPUs for code that is no kernel: memory, copies, waiting. No CUDA header is needed here; a build without CUDA lacks
// the source file behind it (src/base/device_cuda.cpp), and the weak symbols below are then null: only available() may be asked.
#pragma once
#include <cstdint>
#include <memory>
#include <string>

namespace mesa::cuda {

/// "" if a GPU can be used; otherwise why not, in one line: no CUDA in this build, no GPU, a driver too old, an
/// architecture without code, no cuBLAS.
std::string unavailable();
/// True if the CUDA backend is in this build, whether or not a GPU is at hand; and the toolkit that built it, "13.0".
bool built();
[[gnu::weak]] std::string toolkit_version();
inline bool available() { return unavailable().empty(); }

/// All work of the process goes to one stream (a cudaStream_t), in order: kernels, products and copies need not wait for each other.
[[gnu::weak]] void* stream();
/// Waits until everything on the stream is done; throws the error that a kernel left behind, with `what` was waited for.
[[gnu::weak]] void synchronize(const char* what = "waiting for the GPU");

/// Device memory, 256-byte aligned; null when there is no more.
[[gnu::weak]] void* allocate(int64_t bytes);
[[gnu::weak]] void release(void* memory);
/// Host memory that the GPU reads and writes directly; null when there is no more.
[[gnu::weak]] void* allocate_pinned(int64_t bytes);
[[gnu::weak]] void release_pinned(void* memory);

/// Copies on the stream. From and to pageable host memory it returns when the host's side is done; to_host always waits.
[[gnu::weak]] void copy_to_device(void* device, const void* host, int64_t bytes);
[[gnu::weak]] void copy_to_host(void* host, const void* device, int64_t bytes);
[[gnu::weak]] void copy_on_device(void* to, const void* from, int64_t bytes);

[[gnu::weak]] void clear(void* device, int64_t bytes);

/// A point in the work of a stream that another can wait for (an event, returned to a pool when the last holder is gone).
using Mark = std::shared_ptr<void>;
/// After all that stream() has by now.
[[gnu::weak]] Mark mark();
/// Copies beside the work, on a stream of their own for each direction: they begin when `after` is passed, or (null) when all that stream()
/// has by now is done. `host` is pinned. Neither side may be reused before the mark is passed.
[[gnu::weak]] Mark copy_to_host_beside(void* host, const void* device, int64_t bytes);
[[gnu::weak]] Mark copy_to_device_beside(void* device, const void* host, int64_t bytes, const Mark& after = {});
[[gnu::weak]] bool passed(const Mark& mark);
/// What stream() gets from now on begins when the mark is passed; the host does not wait.
[[gnu::weak]] void wait_for(const Mark& mark);

/// Work that is recorded instead of done: everything that stream() gets between begin_recording and end_recording, to be run again and
/// again on the same memory (a CUDA graph). Nothing may wait for the device meanwhile, nor copy from the host.
using Recording = std::shared_ptr<void>;
[[gnu::weak]] void begin_recording();
/// Throws if something was asked for that cannot be recorded; `keep` false drops what there is.
[[gnu::weak]] Recording end_recording(bool keep = true);
[[gnu::weak]] bool recording();
[[gnu::weak]] void run(const Recording& recording);

/// "NVIDIA H200, compute capability 9.0, driver 13.0" for reports.
[[gnu::weak]] std::string describe_device();
/// "cuBLAS 13.1.0, cuDNN 9.19.0 for CUDA 13" as they were found; where available().
[[gnu::weak]] std::string libraries();
/// Bytes of device memory: free now, and in all.
struct DeviceMemory {
  int64_t free = 0, total = 0;
};
[[gnu::weak]] DeviceMemory device_memory();

/// Throws mesa::Error for a CUDA error code (cudaError_t) other than 0: "cuda: <what>: <the driver's words>".
[[gnu::weak]] void check_status(int status, const char* what);
/// True if MESA_SYNC=1: every kernel is waited for, so that an error names the kernel that made it.
[[gnu::weak]] bool synchronous();

namespace detail {
[[gnu::weak]] std::string find_device();
[[gnu::weak]] std::string find_products();  // kernels/cuda/cublaslt_library.cpp: "" if cuBLASLt is there, or why not
[[gnu::weak]] int probe_status();           // kernels/cuda/probe.cu: cudaSuccess if there is code for the GPU
}  // namespace detail

}  // namespace mesa::cuda
