#include "device_memory.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "mesa/base/error.h"

#ifdef MESA_EMULATION_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace mesa::emulation {
namespace {

constexpr size_t kAddresses = size_t{64} << 30;  // reserved: no page is used before it is needed
constexpr size_t kHugePage = 2 << 20;            // pages are opened and closed in these units, a hundred times
                                                 // faster than in small ones
constexpr size_t kAlignment = 256;               // of blocks
constexpr size_t kRedZone = 256;                 // before and behind each block
constexpr size_t kFilled = 16 << 20;             // of each block, so that a huge one costs no real memory
constexpr unsigned char kFresh = 0xff, kGuard = 0xa5;

size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

/// The extent of a block of `bytes`: red zone, the block, the rest of its last 256 bytes and a red zone.
size_t extent_of(size_t bytes) { return kRedZone + rounded(bytes, kAlignment) + kRedZone; }

struct Arena {
  unsigned char* base = nullptr;
  std::atomic<size_t> used{0};      // bytes from the start that blocks have reached
                                    // so far, a multiple of kHugePage
  size_t end = 0;                   // where the next block goes if no gap fits
  std::map<size_t, size_t> blocks;  // offset of the block itself -> its bytes
  std::map<size_t, size_t> gaps;    // offset -> size, of extents given back
  size_t allocated = 0, limit = 0;
  int depth = 0;
  std::recursive_mutex mutex;
  struct sigaction before {};  // what SIGSEGV did before this arena
};

size_t limit_in_environment() {
  const char* wish = std::getenv("MESA_EMULATION_MEMORY");
  if (wish == nullptr || *wish == 0) return size_t{4} << 30;
  char* end = nullptr;
  const unsigned long long bytes = std::strtoull(wish, &end, 10);
  check(*end == 0 && bytes > 0 && bytes < kAddresses, "MESA_EMULATION_MEMORY is '", wish, "'; it is a number of bytes, below 64 GiB");
  return bytes;
}

Arena& arena() {
  static Arena& one = *[] {
    auto* a = new Arena;  // never destroyed, like the tensors in it
    a->limit = limit_in_environment();
    void* memory = mmap(nullptr, kAddresses + kHugePage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    check(memory != MAP_FAILED, "no addresses for emulated device memory");
    a->base = reinterpret_cast<unsigned char*>(rounded(reinterpret_cast<uintptr_t>(memory), kHugePage));
    return a;
  }();
  return one;
}

// --- open and closed --------------------------------------------------------------------------------------------------------------

void protect(size_t from, size_t to, int access) {
  if (from < to && mprotect(arena().base + from, to - from, access) != 0) {
    std::perror("emulation: cannot protect device memory");
    std::abort();
  }
}

void on_fault(int, siginfo_t* info, void*) {
  const Arena& a = arena();
  const auto* at = static_cast<const unsigned char*>(info->si_addr);
  if (at >= a.base && at < a.base + kAddresses) {
    char text[200];
    const char* who =
        a.depth > 0 && at >= a.base + a.used ? "a kernel touched device memory beyond every block" : "host code touched device memory";
    const int length = std::snprintf(text, sizeof text, "emulation: %s at %p\n", who, info->si_addr);
    if (write(STDERR_FILENO, text, static_cast<size_t>(length)) != length) std::abort();
  }
  sigaction(SIGSEGV, &a.before, nullptr);  // the access happens again, and meets
                                           // what would have happened without us
}

/// Test frameworks put their own handlers in place for each test, so this is repeated.
void watch() {
  struct sigaction now {};
  sigaction(SIGSEGV, nullptr, &now);
  if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_fault) return;
  arena().before = now;
  struct sigaction ours {};
  ours.sa_sigaction = on_fault;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  sigaction(SIGSEGV, &ours, nullptr);
}

// --- blocks -----------------------------------------------------------------------------------------------------------------------

#ifdef MESA_EMULATION_ASAN
void poison(const void* memory, size_t bytes) { __asan_poison_memory_region(memory, bytes); }
void unpoison(const void* memory, size_t bytes) { __asan_unpoison_memory_region(memory, bytes); }
#else
void poison(const void*, size_t) {}
void unpoison(const void*, size_t) {}
#endif

/// An extent for `bytes` more: the first gap that holds them, or new addresses.
size_t take_extent(Arena& a, size_t size) {
  for (auto gap = a.gaps.begin(); gap != a.gaps.end(); ++gap) {
    if (gap->second < size) continue;
    const auto [at, room] = *gap;
    a.gaps.erase(gap);
    if (room > size) a.gaps[at + size] = room - size;
    return at;
  }
  const size_t at = a.end;
  a.end += size;
  const size_t before = a.used, now = rounded(a.end, kHugePage);
  if (now > before) {
    protect(before, now, PROT_READ | PROT_WRITE);
    // Also tells these addresses from the rest for the system, which would otherwise join the two whenever they are closed, and part them
    // again.
    madvise(a.base + before, now - before, MADV_HUGEPAGE);
    poison(a.base + before, now - before);
    a.used = now;
  }
  return at;
}

void give_back_extent(Arena& a, size_t at, size_t size) {
  const auto after = a.gaps.lower_bound(at);
  if (after != a.gaps.end() && after->first == at + size) {
    size += after->second;
    a.gaps.erase(after);
  }
  const auto next = a.gaps.lower_bound(at);
  if (next != a.gaps.begin()) {
    const auto previous = std::prev(next);
    if (previous->first + previous->second == at) {
      previous->second += size;
      return;
    }
  }
  a.gaps[at] = size;
}

/// The block that holds this address, or null.
const std::pair<const size_t, size_t>* block_at(const Arena& a, const void* memory) {
  const auto offset = static_cast<size_t>(static_cast<const unsigned char*>(memory) - a.base);
  const auto after = a.blocks.upper_bound(offset);
  if (after == a.blocks.begin()) return nullptr;
  const auto block = std::prev(after);
  return offset < block->first + block->second ? &*block : nullptr;
}

}  // namespace

void open_device() {
  Arena& a = arena();
  a.mutex.lock();
  if (a.depth++ == 0) protect(0, a.used, PROT_READ | PROT_WRITE);
}

void close_device() {
  Arena& a = arena();
  if (--a.depth == 0) {
    protect(0, a.used, PROT_NONE);
    if (a.used > 0) watch();
  }
  a.mutex.unlock();
}

void* allocate_device(size_t bytes) {
  Arena& a = arena();
  const DeviceAccess access;
  const size_t size = extent_of(bytes);
  if (bytes > a.limit - std::min(a.limit, a.allocated) || size > kAddresses - a.end) return nullptr;
  const size_t at = take_extent(a, size);
  unsigned char* const extent = a.base + at;
#ifndef MESA_EMULATION_ASAN
  std::memset(extent, kGuard, kRedZone);
  std::memset(extent + kRedZone + bytes, kGuard, size - kRedZone - bytes);
#endif
  unpoison(extent + kRedZone, bytes);
  std::memset(extent + kRedZone, kFresh, std::min(bytes, kFilled));
  a.blocks[at + kRedZone] = bytes;
  a.allocated += bytes;
  return extent + kRedZone;
}

bool free_device(void* memory) {
  Arena& a = arena();
  const DeviceAccess access;
  const auto block = a.blocks.find(static_cast<size_t>(static_cast<unsigned char*>(memory) - a.base));
  if (block == a.blocks.end()) return false;
  const auto [at, bytes] = *block;
  a.blocks.erase(block);
  a.allocated -= bytes;
  std::memset(memory, kFresh, std::min(bytes, kFilled));
  // The pages of a large block go back to the system; they will be zero, and filled again when they are allocated.
  const size_t first = rounded(at, kHugePage), last = (at + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(a.base + first, last - first, MADV_DONTNEED);
  poison(memory, bytes);
  give_back_extent(a, at - kRedZone, extent_of(bytes));
  return true;
}

bool on_device(const void* memory, size_t bytes) {
  const Arena& a = arena();
  const auto* at = static_cast<const unsigned char*>(memory);
  return at < a.base + kAddresses && at + bytes > a.base;
}

bool allocated_on_device(const void* memory, size_t bytes) {
  Arena& a = arena();
  const std::lock_guard lock(a.mutex);
  if (!on_device(memory, 1)) return false;
  const auto* block = block_at(a, memory);
  return block != nullptr && static_cast<const unsigned char*>(memory) + bytes <= a.base + block->first + block->second;
}

std::string damage() {
#ifndef MESA_EMULATION_ASAN  // which stops at the write itself
  Arena& a = arena();
  const DeviceAccess access;
  static const std::vector<unsigned char> whole(kRedZone + kAlignment, kGuard);
  const auto intact = [](const unsigned char* from, size_t bytes) { return std::memcmp(from, whole.data(), bytes) == 0; };
  for (const auto& [at, bytes] : a.blocks) {
    const unsigned char* const block = a.base + at;
    if (!intact(block - kRedZone, kRedZone)) return concat("before a block of ", bytes, " bytes");
    if (!intact(block + bytes, extent_of(bytes) - kRedZone - bytes)) return concat("behind a block of ", bytes, " bytes");
  }
#endif
  return "";
}

DeviceUse device_use() {
  Arena& a = arena();
  const std::lock_guard lock(a.mutex);
  return {a.allocated, a.limit};
}

void set_device_limit(size_t bytes) {
  Arena& a = arena();
  const std::lock_guard lock(a.mutex);
  a.limit = bytes;
}

}  // namespace mesa::emulation
