// The memory of the emulated device: one range of addresses that the host may not touch.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#define MESA_EMULATION_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MESA_EMULATION_ASAN
#endif
#endif

namespace mesa::emulation {

/// Opens device memory to this thread's code until the last of its scopes ends; outside them an access kills the process, with a message.
/// The device does one thing at a time: another thread waits here. Without an emulated runtime in the program there is nothing to open.
[[gnu::weak]] void open_device();
[[gnu::weak]] void close_device();
struct DeviceAccess {
  DeviceAccess() {
    if (open_device) open_device();
  }
  ~DeviceAccess() {
    if (close_device) close_device();
  }
  DeviceAccess(const DeviceAccess&) = delete;
  DeviceAccess& operator=(const DeviceAccess&) = delete;
};

/// 256-byte aligned, all NaN; null when the limit is reached.
void* allocate_device(size_t bytes);
/// False for what is not the start of a block.
bool free_device(void* memory);

/// True if any of these addresses belongs to the device.
bool on_device(const void* memory, size_t bytes);
/// True if one block holds them all.
bool allocated_on_device(const void* memory, size_t bytes);
/// "" or where something was written outside of every block: "behind a block of 512 bytes".
std::string damage();

struct DeviceUse {
  size_t used = 0, limit = 0;
};
DeviceUse device_use();
/// At first MESA_EMULATION_MEMORY bytes, or 4 GiB.
void set_device_limit(size_t bytes);

/// Does what waits in the stream that kernels of this thread run in.
[[gnu::weak]] void finish_current_stream();
/// True if the engine's stream records: then the work is kept for the graph, and not to be done now.
[[gnu::weak]] bool record(std::function<void()> work);
/// False for a pointer to the host's memory or to a block given back, if the device has any blocks.
[[gnu::weak]] bool kernel_may_use(const void* memory);

}  // namespace mesa::emulation
