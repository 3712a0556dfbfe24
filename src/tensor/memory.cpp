#include "mesa/tensor/memory.h"

#if __has_include(<sanitizer/asan_interface.h>)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(memory, bytes) (static_cast<void>(memory), static_cast<void>(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(memory, bytes) (static_cast<void>(memory), static_cast<void>(bytes))
#endif
#include <sys/mman.h>

#include <atomic>
#include <bit>
#include <cstdio>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "mesa/base/cuda.h"
#include "mesa/base/error.h"
#include "mesa/base/scope.h"

namespace mesa {

const char* to_string(MemoryKind kind) {
  static const char* const names[kMemoryKinds] = {"parameters", "gradients", "optimizer", "activations", "inputs", "workspace"};
  return names[static_cast<int>(kind)];
}

namespace {
constexpr int64_t kAlignment = 64;
constexpr int64_t kHugePage = 2 << 20;

/// Size classes: eight per doubling, so that at most 1/8 of a block is waste; whole huge pages from 2 MiB up.
int64_t size_class(int64_t bytes) {
  if (bytes > kHugePage) return (bytes + kHugePage - 1) / kHugePage * kHugePage;
  if (bytes <= 512) return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  const int64_t step = int64_t{1} << (std::bit_width(static_cast<uint64_t>(bytes - 1)) - 4);
  return (bytes + step - 1) / step * step;
}

std::atomic<uint64_t> next_buffer_id{1};
}  // namespace

struct BlockCache {
  explicit BlockCache(Allocator::Impl& owner) : owner(owner) {}
  ~BlockCache();
  Allocator::Impl& owner;
  std::map<int64_t, std::vector<void*>> free;  // by capacity
  void release();
};

/// Where blocks come from. The base class serves `meta`: it counts and hands out nothing.
class Allocator::Impl {
 public:
  explicit Impl(Device device) : device(device), shared(std::make_shared<BlockCache>(*this)), cache(shared) {}
  virtual ~Impl() = default;
  virtual void* take(int64_t) { return nullptr; }
  virtual void give_back(void*, int64_t) {}

  void count(MemoryKind kind, int64_t bytes) {
    use.live[static_cast<int>(kind)] += bytes;
    use.total += bytes;
    if (use.total > use.peak) {
      use.peak = use.total;
      use.peak_kind = use.live;
    }
  }

  Device device;
  std::mutex mutex;
  MemoryUse use;
  std::shared_ptr<BlockCache> shared, cache;  // everybody's, and the one in use
};

void BlockCache::release() {
  for (auto& [capacity, blocks] : free)
    for (void* block : blocks) {
      if (owner.device == kCpu) ASAN_UNPOISON_MEMORY_REGION(block, static_cast<size_t>(capacity));
      owner.give_back(block, capacity);
      owner.use.reserved -= capacity;
    }
  free.clear();
}

BlockCache::~BlockCache() {
  const std::lock_guard lock(owner.mutex);
  release();
}

namespace {
/// Large blocks ask for huge pages, which spares faults and TLB misses.
class CpuMemory : public Allocator::Impl {
 public:
  CpuMemory() : Impl(kCpu) {}
  void* take(int64_t bytes) override {
    if (bytes < kHugePage) return std::aligned_alloc(kAlignment, bytes);
    void* data = std::aligned_alloc(kHugePage, bytes);
    if (data != nullptr) madvise(data, bytes, MADV_HUGEPAGE);
    return data;
  }
  void give_back(void* data, int64_t) override { std::free(data); }
};
/// One stream does all work in order, so that a block released while a kernel still uses it may be handed out at once.
class CudaMemory : public Allocator::Impl {
 public:
  CudaMemory() : Impl(kCuda) {}
  void* take(int64_t bytes) override { return cuda::allocate(bytes); }
  void give_back(void* data, int64_t) override { cuda::release(data); }
};
class PinnedMemory : public Allocator::Impl {
 public:
  PinnedMemory() : Impl(kPinned) {}
  void* take(int64_t bytes) override { return cuda::allocate_pinned(bytes); }
  void give_back(void* data, int64_t) override { cuda::release_pinned(data); }
};
}  // namespace

Allocator::Allocator(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Allocator::~Allocator() = default;

Allocator& Allocator::of(Device device) {
  // Never destroyed: tensors in static storage may outlive any order of destruction.
  static Allocator& cpu = *new Allocator(std::make_unique<CpuMemory>());
  static Allocator& meta = *new Allocator(std::make_unique<Impl>(kMeta));
  static Allocator& meta_cuda = *new Allocator(std::make_unique<Impl>(kMetaCuda));
  if (device == kCpu) return cpu;
  if (device.kind == DeviceKind::meta) return device == kMetaCuda ? meta_cuda : meta;
  check(cuda::available(), "device cuda: ", cuda::unavailable());
  static Allocator& gpu = *new Allocator(std::make_unique<CudaMemory>());
  static Allocator& pinned = *new Allocator(std::make_unique<PinnedMemory>());
  return device == kPinned ? pinned : gpu;
}

std::shared_ptr<Buffer> Allocator::allocate(int64_t bytes, MemoryKind kind) {
  check(bytes >= 0, "cannot allocate ", bytes, " bytes");
  std::shared_ptr<Buffer> buffer(new Buffer);
  buffer->capacity_ = size_class(std::max<int64_t>(bytes, 1));
  buffer->device_ = impl_->device;
  buffer->kind_ = kind;
  buffer->id_ = next_buffer_id++;
  const bool lasting = kind == MemoryKind::parameters || kind == MemoryKind::gradients || kind == MemoryKind::optimizer;
  const std::lock_guard lock(impl_->mutex);
  buffer->cache_ = lasting ? impl_->shared : impl_->cache;
  auto& free_list = buffer->cache_->free[buffer->capacity_];
  if (!free_list.empty()) {
    buffer->data_ = free_list.back();
    free_list.pop_back();
  } else {
    buffer->data_ = impl_->take(buffer->capacity_);
    const bool real = impl_->device.kind != DeviceKind::meta;
    if (real && buffer->data_ == nullptr) {  // blocks of other sizes may be waiting in the cache
      impl_->shared->release();
      buffer->data_ = impl_->take(buffer->capacity_);
    }
    if (real && buffer->data_ == nullptr && impl_->device == kPinned)
      fail("the system gives no more pinned memory, which GPUs copy from and to: ", format_bytes(bytes), " more were asked for ",
           to_string(kind), "; in use: ", describe(impl_->use),
           "; the codec host, checkpoints, and batches that are ready (data.prefetch) take it");
    if (real && buffer->data_ == nullptr)
      throw OutOfMemory(concat(Scope::path(), Scope::path().empty() ? "" : ": ", "out of memory on ", to_string(impl_->device.kind), ": ",
                               format_bytes(bytes), " more were asked for ", to_string(kind), "; in use: ", describe(impl_->use)));
    impl_->use.reserved += buffer->capacity_;
    ++impl_->use.system_allocations;
  }
  buffer->bytes_ = bytes;
  impl_->count(kind, bytes);
  // Under AddressSanitizer neither the rest of a block nor a cached block may be touched. A GPU may still work on what the host released.
  if (buffer->data_ != nullptr && impl_->device == kCpu) {
    ASAN_POISON_MEMORY_REGION(buffer->data_, static_cast<size_t>(buffer->capacity_));
    ASAN_UNPOISON_MEMORY_REGION(buffer->data_, static_cast<size_t>(bytes));
  }
  return buffer;
}

Buffer::~Buffer() {
  if (bytes_ == 0 && data_ == nullptr) return;  // never handed out, or meta and empty
  Allocator::Impl& impl = *Allocator::of(device_).impl_;
  const std::lock_guard lock(impl.mutex);
  impl.count(kind_, -bytes_);
  if (data_ != nullptr && device_ == kCpu) ASAN_POISON_MEMORY_REGION(data_, static_cast<size_t>(capacity_));
  cache_->free[capacity_].push_back(data_);
}

void Buffer::retag(MemoryKind kind) {
  Allocator::Impl& impl = *Allocator::of(device_).impl_;
  const std::lock_guard lock(impl.mutex);
  impl.use.live[static_cast<int>(kind_)] -= bytes_;
  impl.use.live[static_cast<int>(kind)] += bytes_;
  kind_ = kind;
}

MemoryUse Allocator::use() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->use;
}

void Allocator::reset_peak() {
  const std::lock_guard lock(impl_->mutex);
  impl_->use.peak = impl_->use.total;
  impl_->use.peak_kind = impl_->use.live;
}

void Allocator::release_cached() {
  const std::lock_guard lock(impl_->mutex);
  impl_->shared->release();
}

std::shared_ptr<BlockCache> Allocator::new_cache() { return std::make_shared<BlockCache>(*impl_); }

Allocator::Using::Using(Allocator& allocator, std::shared_ptr<BlockCache> cache) : allocator_(allocator) {
  const std::lock_guard lock(allocator.impl_->mutex);
  previous_ = std::exchange(allocator.impl_->cache, std::move(cache));
}

Allocator::Using::~Using() {
  const std::lock_guard lock(allocator_.impl_->mutex);
  allocator_.impl_->cache.swap(previous_);
}

std::string format_bytes(int64_t bytes) {
  char text[32];
  const double b = static_cast<double>(bytes);
  if (bytes < 1000)
    std::snprintf(text, sizeof text, "%lld B", static_cast<long long>(bytes));
  else if (bytes < 1000000)
    std::snprintf(text, sizeof text, "%.1f kB", b / 1e3);
  else if (bytes < 1000000000)
    std::snprintf(text, sizeof text, "%.1f MB", b / 1e6);
  else
    std::snprintf(text, sizeof text, "%.2f GB", b / 1e9);
  return text;
}

std::string describe(const MemoryUse& use) {
  std::string out;
  for (int i = 0; i < kMemoryKinds; ++i)
    if (use.live[i] != 0) out += concat(out.empty() ? "" : ", ", to_string(static_cast<MemoryKind>(i)), " ", format_bytes(use.live[i]));
  return out.empty() ? "nothing" : out;
}

}  // namespace mesa
