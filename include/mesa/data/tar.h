// Tar archives as the data sets of WebDataset come in: ustar, GNU and pax headers, read without their contents.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace mesa {

/// Copies `count` bytes from `offset` on, which lie inside the archive.
using ReadAt = std::function<void(uint64_t offset, uint8_t* to, size_t count)>;

/// A plain file in an archive.
struct TarFile {
  std::string name;
  uint64_t offset = 0, size = 0;  ///< of its content, in bytes from the archive's begin
};

/// The plain files of an archive of `size` bytes, in its order. Throws Error naming `name` for gzip, truncation, a missing end, wrong
/// checksums, sizes beyond the archive, damaged long names or pax headers, links and sparse files.
std::vector<TarFile> list_tar(const ReadAt& read, uint64_t size, const std::string& name);

/// A labelled picture of a shard.
struct ShardSample {
  std::string name;  ///< of the picture's file
  uint64_t offset = 0, size = 0;
  int64_t label = 0;
};

/// Labels lie below this.
inline constexpr int64_t kMaxClasses = 1'000'000;

/// The samples of a shard in WebDataset's layout, in the order of their pictures: files of one name up to the first dot belong together,
/// here KEY.jpg, KEY.jpeg or KEY.png with KEY.cls, which holds the label as text; they may lie anywhere. Other and hidden files are passed
/// over. Throws Error naming the shard and the file for what list_tar refuses, a picture without a label or the reverse, a key that comes
/// twice, labels that are no numbers in 0..kMaxClasses - 1, and a shard without samples.
std::vector<ShardSample> index_shard(const ReadAt& read, uint64_t size, const std::string& name);

}  // namespace mesa
