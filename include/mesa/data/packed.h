// The packed file: both halves of a data set in one file that is mapped into memory.
//
// Little-endian: the 8 bytes "MESAPACK"; the records, one after the other; the table, which is the class names (each a u32 length and its
// bytes) and one PackedRecord a picture, first those for training; a PackedEnd. A record is a JPEG or PNG file, or pixels.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "mesa/data/dataset.h"

namespace mesa {

inline constexpr char kPackedMagic[] = "MESAPACK";  // without its zero
inline constexpr uint32_t kPackedVersion = 1;

struct PackedRecord {
  uint64_t offset = 0;  ///< from the file's begin
  uint32_t bytes = 0, crc32 = 0, label = 0;
  uint32_t height = 0, width = 0, channels = 0;  ///< of pixels; 0 of a picture file
};
static_assert(sizeof(PackedRecord) == 32);

struct PackedEnd {
  uint64_t file_bytes = 0, table_offset = 0, names_bytes = 0;
  uint64_t train = 0, test = 0;  ///< records
  uint32_t classes = 0, version = kPackedVersion;
  uint32_t table_crc32 = 0, crc32 = 0;  ///< the last one of this struct with a zero in its place
  std::array<char, 8> magic{'M', 'E', 'S', 'A', 'P', 'A', 'C', 'K'};
};
static_assert(sizeof(PackedEnd) == 64);

/// What stands in a packed file: its table, and views of its pictures.
class PackedTable {
 public:
  /// Checks everything but the records' contents, whose checksums are compared as they are read: versions, checksums, sizes and offsets
  /// (records lie inside the file, labels below the number of classes, pixels as many as their extents say). Throws Error naming `name`.
  PackedTable(std::span<const uint8_t> bytes, const std::string& name);
  int64_t train() const { return static_cast<int64_t>(end_.train); }
  int64_t test() const { return static_cast<int64_t>(end_.test); }
  const std::vector<std::string>& class_names() const { return names_; }
  /// Test records follow those for training.
  const PackedRecord& record(int64_t index) const { return records_[index]; }
  /// The picture; throws Error naming `name` and the record where its checksum differs.
  StoredPicture picture(int64_t index) const;

 private:
  void read_names(std::span<const uint8_t> text);
  void check_record(int64_t index) const;
  std::span<const uint8_t> bytes_;
  std::string name_;
  PackedEnd end_;
  std::vector<std::string> names_;
  std::vector<PackedRecord> records_;  // a copy: should the file be cut, nobody reads the table where it was
};

/// The table and the end of a packed file whose records end at `table_offset`.
std::string packed_table(const std::vector<std::string>& class_names, std::span<const PackedRecord> records, int64_t train,
                         uint64_t table_offset);

struct PackOptions {
  int64_t size = 0;  ///< larger pictures are reduced until their shorter side is this long; 0 leaves all as they are
  bool raw = false;  ///< pixels, in place of JPEG
  int64_t max_pixels = DecodeOptions{}.max_pixels;
};

/// Sample `index` as it is to be packed. Every picture is decoded, so that damaged ones are found now. A file that need not change stays as
/// it is; a reduced one (bicubic) becomes a JPEG of quality 95; what is no picture file (CIFAR, IDX, ...) becomes pixels.
StoredPicture pack_picture(const Dataset& data, int64_t index, const PackOptions& options);

}  // namespace mesa
