// A caching allocator with a byte meter: memory by kind, on every device, with nothing taken from the system in the steady state.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <string>

#include "mesa/base/device.h"

namespace mesa {

/// `tables`: small things that outlive a pass, as counters and the lists of kernels' work.
enum class MemoryKind : uint8_t { parameters, gradients, optimizer, activations, inputs, workspace, tables };
inline constexpr int kMemoryKinds = 7;
const char* to_string(MemoryKind kind);

/// Bytes that live tensors asked for, by kind; `peak` is the largest total seen since reset_peak(), `peak_kind` its parts at that moment.
struct MemoryUse {
  std::array<int64_t, kMemoryKinds> live{};
  int64_t total = 0;
  int64_t peak = 0;
  std::array<int64_t, kMemoryKinds> peak_kind{};
  int64_t reserved = 0;            ///< bytes taken from the system, cached blocks included
  int64_t lasting = 0;             ///< of them those for what outlives a pass
  int64_t covered = 0;             ///< of the others those that have been in use, with what lay between blocks; of a GPU
  int64_t system_allocations = 0;  ///< how often the system was asked
  int64_t of(MemoryKind kind) const { return live[static_cast<int>(kind)]; }
};

/// Of a free stretch of memory, from which blocks are cut: that of the low addresses or the other.
enum class BlockEnd { low, high };

/// Blocks between two uses, with the memory that they return to.
struct BlockCache;

/// Whether MESA_OWN_BLOCKS=1 is in the environment: every tensor on a GPU then has a block of the driver's for itself, exactly as long as
/// it is, which goes back as soon as nobody has it. Slow; for compute-sanitizer, which sees no access from one tensor into another within a
/// larger block.
bool own_blocks();

/// One block of memory. `id` is never reused, so it names a buffer for ever (an address does not).
class Buffer {
 public:
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  uint64_t id() const { return id_; }
  Device device() const { return device_; }
  MemoryKind kind() const { return kind_; }
  /// Counts the buffer under another kind from now on (workspace that became a kept activation).
  void retag(MemoryKind kind);

 private:
  friend class Allocator;
  Buffer() = default;
  void* data_ = nullptr;
  int64_t bytes_ = 0;
  int64_t capacity_ = 0;
  uint64_t id_ = 0;
  char* block_ = nullptr;  // an address also of meta memory, which has no data
  std::shared_ptr<BlockCache> cache_;
  Device device_;
  MemoryKind kind_ = MemoryKind::workspace;
};

/// Thread-safe. What is released is cached for reuse: blocks of size classes (at most 1/8 waste, or 2 MiB), and on a GPU segments from
/// which blocks of any size are cut. There what outlives a pass (parameters, gradients, optimizer, inputs) has segments of its own: each
/// pass so finds the others empty, and its blocks fall on the places where a plan put them.
class Allocator {
 public:
  static Allocator& of(Device device);

  /// 64-byte aligned, uninitialized. Throws Error naming the request and the use by kind when the system has no more.
  std::shared_ptr<Buffer> allocate(int64_t bytes, MemoryKind kind);
  MemoryUse use() const;
  void reset_peak();
  /// Returns to the system what is cached, as far as nothing that lives is part of it.
  void release_cached();
  /// On a GPU, takes from the system at once what a plan says will be needed for what outlives a pass and for the rest, or what there is of
  /// it, so that blocks of all sizes share it. Elsewhere nothing.
  void reserve(int64_t lasting, int64_t passing);
  /// On a GPU, how blocks are cut from now on. By which end less is lost between blocks differs from model to model.
  void cut_from(BlockEnd end);

  /// A cache of its own, with `reserved` bytes on a GPU, else empty at first; its blocks return to the system when neither its holder nor a
  /// tensor is left.
  std::shared_ptr<BlockCache> new_cache(int64_t reserved = 0);
  /// While it lives, blocks of what a pass needs (activations, inputs, workspace) come from this cache and no other: recorded work owns the
  /// addresses that it uses. What outlives a pass comes from everybody's as ever. One thread allocates on a device meanwhile.
  class Using {
   public:
    Using(Allocator& allocator, std::shared_ptr<BlockCache> cache);
    ~Using();
    Using(const Using&) = delete;
    Using& operator=(const Using&) = delete;

   private:
    Allocator& allocator_;
    std::shared_ptr<BlockCache> previous_;
  };

  class Impl;
  explicit Allocator(std::unique_ptr<Impl> impl);
  ~Allocator();

 private:
  friend class Buffer;
  std::unique_ptr<Impl> impl_;
};

/// "activations 12.3 MB, workspace 4.5 MB, ..." for reports and out-of-memory errors.
std::string describe(const MemoryUse& use);
/// "12.3 MB" (1 MB = 10^6 bytes)
std::string format_bytes(int64_t bytes);

}  // namespace mesa
