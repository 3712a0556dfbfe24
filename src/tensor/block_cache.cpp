#include "block_cache.h"

#if __has_include(<sanitizer/asan_interface.h>)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_UNPOISON_MEMORY_REGION(memory, bytes) (static_cast<void>(memory), static_cast<void>(bytes))
#endif

#include <bit>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace mesa {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kUnit = 512;                  // of blocks in segments: what cudaMalloc aligns to, and more than a line of the cache
constexpr int64_t kEndless = int64_t{1} << 46;  // addresses of a meta segment, and more than any machine's memory

#ifdef __SANITIZE_ADDRESS__
constexpr bool kBlocksAreTheSystems = true;
#else
constexpr bool kBlocksAreTheSystems = false;
#endif

int64_t round_up(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

int64_t size_class(int64_t bytes) {
  if (bytes > kHugePage) return round_up(bytes, kHugePage);
  if (bytes <= 512) return round_up(bytes, kAlignment);
  return round_up(bytes, int64_t{1} << (std::bit_width(static_cast<uint64_t>(bytes - 1)) - 4));
}

}  // namespace

bool own_blocks() {
  const char* const wish = std::getenv("MESA_OWN_BLOCKS");
  return wish != nullptr && std::strcmp(wish, "1") == 0;
}

char* SystemMemory::take(int64_t bytes) {
  char* const address = next_;
  next_ += round_up(bytes, kHugePage);
  return address;
}

char* BlockCache::from_system(int64_t bytes) {
  char* const address = system.take(bytes);
  if (address == nullptr) return nullptr;
  system.use.reserved += bytes, taken += bytes;
  ++system.use.system_allocations;
  return address;
}

void BlockCache::to_system(char* address, int64_t bytes) {
  system.give_back(address, bytes);
  system.use.reserved -= bytes, taken -= bytes;
}

// --- size classes -----------------------------------------------------------------------------------------------------------------

SizeClasses::~SizeClasses() {
  const std::lock_guard lock(system.mutex);
  release();
}

BlockCache::Block SizeClasses::take(int64_t bytes) {
  const int64_t capacity = size_class(bytes);
  std::vector<char*>& blocks = free_[capacity];
  if (blocks.empty()) return {from_system(capacity), capacity};
  char* const address = blocks.back();
  blocks.pop_back();
  return {address, capacity};
}

void SizeClasses::release() {
  for (auto& [capacity, blocks] : free_)
    for (char* block : blocks) {
      if (system.device == kCpu) ASAN_UNPOISON_MEMORY_REGION(block, static_cast<size_t>(capacity));
      to_system(block, capacity);
    }
  free_.clear();
}

// --- segments ---------------------------------------------------------------------------------------------------------------------

Segments::Segments(SystemMemory& system) : BlockCache(system) {
  if (!endless()) return;
  begin_ = tail_ = used_ = system.take(kEndless);
  end_ = begin_ + kEndless;
}

Segments::~Segments() {
  const std::lock_guard lock(system.mutex);
  release();
}

void Segments::add(char* address, int64_t bytes) {
  if (bytes == 0) return;
  free_[address] = bytes;
  by_size_.insert({bytes, address});
}

int64_t Segments::remove(char* address) {
  const auto at = free_.find(address);
  const int64_t bytes = at->second;
  by_size_.erase({bytes, address});
  free_.erase(at);
  return bytes;
}

BlockCache::Block Segments::cut(char* address, int64_t whole, int64_t bytes) {
  add(address + bytes, whole - bytes);
  return {address, bytes};
}

char* Segments::new_segment(int64_t bytes) {
  char* const address = from_system(bytes);
  if (address != nullptr) segments_[address] = bytes;
  return address;
}

BlockCache::Block Segments::take(int64_t bytes) {
  const int64_t size = round_up(bytes, kUnit), segment = round_up(size, kHugePage);
  if (const auto best = by_size_.lower_bound({size, nullptr}); best != by_size_.end()) {
    char* const address = best->second;
    const int64_t whole = remove(address);
    if (system.cut_from == BlockEnd::low) return cut(address, whole, size);
    add(address, whole - size);
    return {address + whole - size, size};
  }
  if (end_ - tail_ >= size) {
    char* const address = std::exchange(tail_, tail_ + size);
    if (tail_ > used_) {
      const int64_t more = tail_ - std::exchange(used_, tail_);
      if (endless()) system.use.reserved += more, taken += more;
    }
    return {address, size};
  }
  if (char* const address = new_segment(segment)) return cut(address, segment, size);
  return {new_segment(size), size};
}

void Segments::give_back(Block block) {
  auto [address, bytes] = block;
  if (char* const next = address + bytes; free_.count(next) != 0 && segments_.count(next) == 0) bytes += remove(next);
  if (const auto after = free_.lower_bound(address); after != free_.begin() && segments_.count(address) == 0) {
    char* const before = std::prev(after)->first;
    if (before + std::prev(after)->second == address) bytes += remove(before), address = before;
  }
  if (begin_ <= address && address + bytes == tail_)
    tail_ = address;
  else
    add(address, bytes);
}

void Segments::release() {
  if (endless()) {
    system.use.reserved -= used_ - tail_, taken -= used_ - tail_;
    used_ = tail_;
    return;
  }
  for (auto segment = segments_.begin(); segment != segments_.end();) {
    const auto [address, bytes] = *segment;
    const auto stretch = free_.find(address);
    const bool reserved = address == begin_ && end_ != nullptr;
    if (reserved ? tail_ != begin_ : stretch == free_.end() || stretch->second != bytes) {
      ++segment;
      continue;
    }
    if (reserved)
      begin_ = tail_ = used_ = end_ = nullptr;
    else
      remove(address);
    to_system(address, bytes);
    segment = segments_.erase(segment);
  }
}

void Segments::reserve(int64_t bytes) {
  if (end_ - begin_ >= bytes) return;  // as an earlier run of this process needed
  release();
  const int64_t step = round_up(bytes / 32 + 1, kUnit);
  int64_t size = round_up(bytes, kUnit);
  char* address = nullptr;
  for (; address == nullptr && size >= bytes / 2; size -= step) address = new_segment(size);
  if (address == nullptr) return;
  if (end_ != nullptr) add(tail_, end_ - tail_);
  begin_ = tail_ = used_ = address;
  end_ = address + segments_[address];
}

std::shared_ptr<BlockCache> make_cache(SystemMemory& system, bool cut) {
  if (system.device.kind == DeviceKind::cuda && own_blocks()) return std::make_shared<OwnBlocks>(system);
  const bool gpu = system.device.kind == DeviceKind::cuda || system.device == kMetaCuda;
  if (gpu && cut && !kBlocksAreTheSystems) return std::make_shared<Segments>(system);
  return std::make_shared<SizeClasses>(system);
}

}  // namespace mesa
