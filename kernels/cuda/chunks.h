// Lists of tensors for one kernel: cut into chunks of bounded size, one for each block, in a table on the device.
#pragma once
#include <list>

#include "cuda.h"
#include "mesa/base/cuda.h"

namespace mesa::kernels::cuda {
namespace {

/// The table on the device; it lives at least until the next call of chunk_table<Part> in this thread.
template <class Part>
struct ChunkTable {
  const Part* chunks;
  int64_t count;
};

/// The chunks of all parts, in order: part.slice(begin, count) for runs of `size` elements of part.count. A table is made and sent to the
/// device once and found again by the exact contents of `parts` (addresses, sizes and what else they hold), so that the steps of a training
/// run only compare; a few tables are kept, for several lists that take turns. Parts with equal contents may share a table whatever
/// tensors they came from.
template <class Part>
ChunkTable<Part> chunk_table(const std::vector<Part>& parts, int64_t size, Device device) {
  struct Entry {
    std::vector<Part> parts, chunks;  // the chunks stay: a captured graph may read them again
    Tensor table;
  };
  constexpr size_t kTables = 8;
  static thread_local std::list<Entry> cache;  // the latest first; each thread has its own, which so needs no lock
  auto found = std::find_if(cache.begin(), cache.end(), [&](const Entry& entry) { return entry.parts == parts; });
  if (found == cache.end()) {
    Entry entry{parts, {}, {}};
    for (const Part& part : parts)
      for (int64_t begin = 0; begin < part.count; begin += size)
        entry.chunks.push_back(part.slice(begin, std::min(size, part.count - begin)));
    const auto bytes = static_cast<int64_t>(entry.chunks.size() * sizeof(Part));
    entry.table = Tensor::empty({bytes}, DType::u8, device, MemoryKind::tables);
    mesa::cuda::copy_to_device(entry.table.raw(), entry.chunks.data(), bytes);
    if (cache.size() == kTables) cache.pop_back();
    found = cache.insert(cache.end(), std::move(entry));
  }
  cache.splice(cache.begin(), cache, found);
  return {static_cast<const Part*>(found->table.raw()), static_cast<int64_t>(found->chunks.size())};
}

}  // namespace
}  // namespace mesa::kernels::cuda
