// Memory between two uses: what the allocator has taken from the system and hands out again.
#pragma once
#include <map>
#include <mutex>
#include <set>
#include <vector>

#include "mesa/tensor/memory.h"

namespace mesa {

/// Where the memory of a device comes from, and what has been counted of it. This one serves `meta`: its addresses have nothing behind
/// them.
struct SystemMemory {
  explicit SystemMemory(Device device) : device(device) {}
  virtual ~SystemMemory() = default;
  /// Null when there is no more.
  virtual char* take(int64_t bytes);
  virtual void give_back(char*, int64_t) {}

  const Device device;
  std::mutex mutex;  // of what follows, and of all caches of this memory
  MemoryUse use;
  BlockEnd cut_from = BlockEnd::high;

 private:
  char* next_ = reinterpret_cast<char*>(uintptr_t{1} << 20);
};

/// Alignments of blocks are 64 bytes at least.
struct BlockCache {
  struct Block {
    char* address = nullptr;
    int64_t capacity = 0;
  };
  explicit BlockCache(SystemMemory& system) : system(system) {}
  virtual ~BlockCache() = default;
  /// At least so many bytes; a null address when the system has no more.
  virtual Block take(int64_t bytes) = 0;
  virtual void give_back(Block block) = 0;
  /// What nobody uses returns to the system.
  virtual void release() = 0;
  /// All that will be needed, at once, or what there is of it: that is no error.
  virtual void reserve(int64_t) {}
  /// So much of what was taken has been in use since it was taken, with what lay between blocks.
  virtual int64_t covered() const { return taken; }

  SystemMemory& system;
  int64_t taken = 0;  ///< from the system, now

 protected:
  char* from_system(int64_t bytes);
  void to_system(char* address, int64_t bytes);
};

/// Blocks of some sizes, each used for its size only: eight sizes per doubling, so that at most 1/8 of a block is waste, and whole huge
/// pages from 2 MiB up. A block is the system's own, so that AddressSanitizer sees what goes beyond it.
class SizeClasses : public BlockCache {
 public:
  using BlockCache::BlockCache;
  ~SizeClasses() override;
  Block take(int64_t bytes) override;
  void give_back(Block block) override { free_[block.capacity].push_back(block.address); }
  void release() override;

 private:
  std::map<int64_t, std::vector<char*>> free_;  // by capacity
};

/// Each block the system's own, as long as was asked for, and given back as soon as it is released (see own_blocks()).
class OwnBlocks : public BlockCache {
 public:
  using BlockCache::BlockCache;
  Block take(int64_t bytes) override { return {from_system(bytes), bytes}; }
  void give_back(Block block) override { to_system(block.address, block.capacity); }
  void release() override {}
};

/// Blocks cut from large segments: the smallest free stretch that is large enough serves, and neighbours that are free become one again.
/// Sizes that are needed at different times so share memory. Of meta memory the one segment has no end, and what counts is how far it has
/// been used; a segment of that size then serves the same requests, each at the same place.
class Segments : public BlockCache {
 public:
  explicit Segments(SystemMemory& system);
  ~Segments() override;
  Block take(int64_t bytes) override;
  void give_back(Block block) override;
  void release() override;
  void reserve(int64_t bytes) override;
  int64_t covered() const override { return endless() ? taken : taken - (end_ - used_); }

 private:
  void add(char* address, int64_t bytes);
  int64_t remove(char* address);
  Block cut(char* address, int64_t whole, int64_t bytes);
  char* new_segment(int64_t bytes);
  bool endless() const { return system.device.kind == DeviceKind::meta; }

  std::map<char*, int64_t> segments_, free_;                  // bytes by address; free stretches but for the tail
  std::set<std::pair<int64_t, char*>> by_size_;               // the same stretches
  char *begin_ = nullptr, *tail_ = nullptr, *end_ = nullptr;  // of the segment reserved, whose free tail serves where nothing else does
  char* used_ = nullptr;                                      // of that segment, all that has been used lies before
};

/// Of GPUs' memory segments, if blocks may be `cut`, and size classes of other memory, and wherever AddressSanitizer is to see every block.
/// With own_blocks() all of a GPU's are `OwnBlocks`.
std::shared_ptr<BlockCache> make_cache(SystemMemory& system, bool cut = true);

}  // namespace mesa
