#include "mesa/tensor/memory.h"

#if __has_include(<sanitizer/asan_interface.h>)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(memory, bytes) (static_cast<void>(memory), static_cast<void>(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(memory, bytes) (static_cast<void>(memory), static_cast<void>(bytes))
#endif
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <mutex>
#include <utility>

#include "block_cache.h"
#include "mesa/base/cuda.h"
#include "mesa/base/error.h"
#include "mesa/base/scope.h"

namespace mesa {

const char* to_string(MemoryKind kind) {
  static const char* const names[kMemoryKinds] = {"parameters", "gradients", "optimizer", "activations", "inputs", "workspace", "tables"};
  return names[static_cast<int>(kind)];
}

/// What a device's memory is, and the caches of it.
class Allocator::Impl {
 public:
  explicit Impl(std::unique_ptr<SystemMemory> memory)
      : system(std::move(memory)),
        shared(make_cache(*system)),
        lasting(is_gpu(system->device) ? make_cache(*system) : shared),
        tables(is_gpu(system->device) ? make_cache(*system, false) : shared),
        cache(shared) {}

  void count(MemoryKind kind, int64_t bytes) {
    MemoryUse& use = system->use;
    use.live[static_cast<int>(kind)] += bytes;
    use.total += bytes;
    if (use.total > use.peak) {
      use.peak = use.total;
      use.peak_kind = use.live;
    }
  }

  const std::unique_ptr<SystemMemory> system;
  void release() {
    shared->release();
    if (lasting != shared) lasting->release(), tables->release();
  }

  const std::shared_ptr<BlockCache>& cache_of(MemoryKind kind) const {
    switch (kind) {
      case MemoryKind::parameters:
      case MemoryKind::gradients:
      case MemoryKind::optimizer: return lasting;
      case MemoryKind::tables: return tables;
      case MemoryKind::inputs: return cache == shared ? lasting : cache;
      case MemoryKind::activations:
      case MemoryKind::workspace: break;
    }
    return cache;
  }

  // Everybody's for passes and for what outlives them, for tables, which may outlive a run and so pin a segment, and the one of passes now.
  std::shared_ptr<BlockCache> shared, lasting, tables, cache;
};

namespace {
constexpr int64_t kAlignment = 64;
constexpr int64_t kHugePage = 2 << 20;

std::atomic<uint64_t> next_buffer_id{1};

/// Large blocks ask for huge pages, which spares faults and TLB misses.
class CpuMemory : public SystemMemory {
 public:
  CpuMemory() : SystemMemory(kCpu) {}
  char* take(int64_t bytes) override {
    void* const data = std::aligned_alloc(bytes < kHugePage ? kAlignment : kHugePage, static_cast<size_t>(bytes));
    if (data != nullptr && bytes >= kHugePage) madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);
    return static_cast<char*>(data);
  }
  void give_back(char* data, int64_t) override { std::free(data); }
};
/// One stream does all work in order, so that a block released while a kernel still uses it may be handed out at once.
class CudaMemory : public SystemMemory {
 public:
  CudaMemory() : SystemMemory(kCuda) {}
  char* take(int64_t bytes) override { return static_cast<char*>(cuda::allocate(bytes)); }
  void give_back(char* data, int64_t) override { cuda::release(data); }
};
class PinnedMemory : public SystemMemory {
 public:
  PinnedMemory() : SystemMemory(kPinned) {}
  char* take(int64_t bytes) override { return static_cast<char*>(cuda::allocate_pinned(bytes)); }
  void give_back(char* data, int64_t) override { cuda::release_pinned(data); }
};
}  // namespace

Allocator::Allocator(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Allocator::~Allocator() = default;

Allocator& Allocator::of(Device device) {
  // Never destroyed: tensors in static storage may outlive any order of destruction.
  static Allocator& cpu = *new Allocator(std::make_unique<Impl>(std::make_unique<CpuMemory>()));
  static Allocator& meta = *new Allocator(std::make_unique<Impl>(std::make_unique<SystemMemory>(kMeta)));
  static Allocator& meta_cuda = *new Allocator(std::make_unique<Impl>(std::make_unique<SystemMemory>(kMetaCuda)));
  if (device == kCpu) return cpu;
  if (device.kind == DeviceKind::meta) return device == kMetaCuda ? meta_cuda : meta;
  check(cuda::available(), "device cuda: ", cuda::unavailable());
  static Allocator& gpu = *new Allocator(std::make_unique<Impl>(std::make_unique<CudaMemory>()));
  static Allocator& pinned = *new Allocator(std::make_unique<Impl>(std::make_unique<PinnedMemory>()));
  return device == kPinned ? pinned : gpu;
}

std::shared_ptr<Buffer> Allocator::allocate(int64_t bytes, MemoryKind kind) {
  check(bytes >= 0, "cannot allocate ", bytes, " bytes");
  SystemMemory& system = *impl_->system;
  std::shared_ptr<Buffer> buffer(new Buffer);
  buffer->device_ = system.device;
  buffer->kind_ = kind;
  buffer->id_ = next_buffer_id++;
  const std::lock_guard lock(system.mutex);
  const std::shared_ptr<BlockCache>& cache = impl_->cache_of(kind);
  BlockCache::Block block = cache->take(std::max<int64_t>(bytes, 1));
  // What waits in the cache may be of other sizes. While work is recorded nothing can be given back, for that waits.
  const bool recording = (system.device == kCuda || system.device == kPinned) && cuda::recording();
  if (block.address == nullptr && !recording) {
    impl_->release();
    block = cache->take(std::max<int64_t>(bytes, 1));
  }
  if (block.address == nullptr && system.device == kPinned)
    fail("the system gives no more pinned memory, which GPUs copy from and to: ", format_bytes(bytes), " more were asked for ",
         to_string(kind), "; in use: ", describe(system.use),
         "; the codec host, checkpoints, and batches that are ready (data.prefetch) take it");
  if (block.address == nullptr)
    throw OutOfMemory(concat(Scope::path(), Scope::path().empty() ? "" : ": ", "out of memory on ", to_string(system.device.kind), ": ",
                             format_bytes(bytes), " more were asked for ", to_string(kind), "; in use: ", describe(system.use)));
  buffer->cache_ = cache;
  buffer->block_ = block.address, buffer->capacity_ = block.capacity;
  if (system.device.kind != DeviceKind::meta) buffer->data_ = block.address;
  buffer->bytes_ = bytes;
  impl_->count(kind, bytes);
  // Under AddressSanitizer neither the rest of a block nor a cached block may be touched. A GPU may still work on what the host released.
  if (system.device == kCpu) {
    ASAN_POISON_MEMORY_REGION(block.address, static_cast<size_t>(block.capacity));
    ASAN_UNPOISON_MEMORY_REGION(block.address, static_cast<size_t>(bytes));
  }
  return buffer;
}

Buffer::~Buffer() {
  if (block_ == nullptr) return;  // never handed out
  Allocator::Impl& impl = *Allocator::of(device_).impl_;
  const std::lock_guard lock(impl.system->mutex);
  impl.count(kind_, -bytes_);
  if (device_ == kCpu) ASAN_POISON_MEMORY_REGION(block_, static_cast<size_t>(capacity_));
  cache_->give_back({block_, capacity_});
}

void Buffer::retag(MemoryKind kind) {
  Allocator::Impl& impl = *Allocator::of(device_).impl_;
  const std::lock_guard lock(impl.system->mutex);
  impl.system->use.live[static_cast<int>(kind_)] -= bytes_;
  impl.system->use.live[static_cast<int>(kind)] += bytes_;
  kind_ = kind;
}

MemoryUse Allocator::use() const {
  const std::lock_guard lock(impl_->system->mutex);
  MemoryUse use = impl_->system->use;
  use.lasting = impl_->lasting->taken;
  use.covered = impl_->shared->covered();
  return use;
}

void Allocator::reset_peak() {
  const std::lock_guard lock(impl_->system->mutex);
  MemoryUse& use = impl_->system->use;
  use.peak = use.total;
  use.peak_kind = use.live;
}

void Allocator::release_cached() {
  const std::lock_guard lock(impl_->system->mutex);
  impl_->release();
}

void Allocator::reserve(int64_t lasting, int64_t passing) {
  const std::lock_guard lock(impl_->system->mutex);
  if (impl_->lasting != impl_->shared) impl_->lasting->reserve(lasting);
  impl_->shared->reserve(passing);
}

void Allocator::cut_from(BlockEnd end) {
  const std::lock_guard lock(impl_->system->mutex);
  impl_->system->cut_from = end;
}

std::shared_ptr<BlockCache> Allocator::new_cache(int64_t reserved) {
  std::shared_ptr<BlockCache> cache = make_cache(*impl_->system);
  const std::lock_guard lock(impl_->system->mutex);
  cache->reserve(reserved);
  return cache;
}

Allocator::Using::Using(Allocator& allocator, std::shared_ptr<BlockCache> cache) : allocator_(allocator) {
  const std::lock_guard lock(allocator.impl_->system->mutex);
  previous_ = std::exchange(allocator.impl_->cache, std::move(cache));
}

Allocator::Using::~Using() {
  const std::lock_guard lock(allocator_.impl_->system->mutex);
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
