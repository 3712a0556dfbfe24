#include "mesa/data/packed.h"

#include <zlib.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <filesystem>

#include "class_names.h"
#include "mesa/base/files.h"
#include "mesa/data/resize.h"
#include "mesa/data/tar.h"
#include "stored_dataset.h"

namespace mesa {

static_assert(std::endian::native == std::endian::little, "packed files are little-endian");

namespace {
constexpr size_t kMagicBytes = 8;
constexpr int kQuality = 95;

uint32_t crc_of(std::span<const uint8_t> bytes) { return static_cast<uint32_t>(crc32_z(0, bytes.data(), bytes.size())); }

uint32_t crc_of(PackedEnd end) {
  end.crc32 = 0;
  return crc_of({reinterpret_cast<const uint8_t*>(&end), sizeof end});
}
}  // namespace

PackedTable::PackedTable(std::span<const uint8_t> bytes, const std::string& name) : bytes_(bytes), name_(name) {
  const uint64_t size = bytes.size();
  const bool begins = size >= kMagicBytes && std::memcmp(bytes.data(), kPackedMagic, kMagicBytes) == 0;
  check(begins, name, ": is not a packed data set; mesa-train --pack writes one");
  const bool ends = size >= kMagicBytes + sizeof end_ && std::memcmp(bytes.data() + size - kMagicBytes, kPackedMagic, kMagicBytes) == 0;
  check(ends, name, ": is truncated; pack or copy it again");
  std::memcpy(&end_, bytes.data() + size - sizeof end_, sizeof end_);
  check(crc_of(end_) == end_.crc32, name, ": is damaged: wrong checksum of its last ", sizeof end_, " bytes");
  check(end_.version == kPackedVersion, name, ": has version ", end_.version, ", but this version of Mesa reads ", kPackedVersion,
        "; pack the data again");
  check(end_.file_bytes == size, name, ": is damaged: has ", size, " bytes in place of ", end_.file_bytes);
  const uint64_t most = size / sizeof(PackedRecord);
  check(end_.train <= most && end_.test <= most && end_.names_bytes <= size && end_.table_offset >= kMagicBytes &&
            end_.table_offset <= size - sizeof end_,
        name, ": is damaged: its table does not fit the file");
  const uint64_t table_bytes = end_.names_bytes + (end_.train + end_.test) * sizeof(PackedRecord);
  check(table_bytes == size - sizeof end_ - end_.table_offset, name, ": is damaged: its table does not fit the file");
  check(crc_of(bytes.subspan(end_.table_offset, table_bytes)) == end_.table_crc32, name, ": is damaged: wrong checksum of its table");
  read_names(bytes.subspan(end_.table_offset, end_.names_bytes));
  records_.resize(end_.train + end_.test);
  if (!records_.empty())
    std::memcpy(records_.data(), bytes.data() + end_.table_offset + end_.names_bytes, records_.size() * sizeof(PackedRecord));
  for (int64_t i = 0; i < train() + test(); ++i) check_record(i);
}

void PackedTable::read_names(std::span<const uint8_t> text) {
  check(end_.classes <= kMaxClasses, name_, ": is damaged: claims ", end_.classes, " classes");
  for (uint32_t i = 0; i < end_.classes; ++i) {
    uint32_t length = 0;
    check(text.size() >= sizeof length, name_, ": is damaged: class name ", i, " is cut off");
    std::memcpy(&length, text.data(), sizeof length);
    text = text.subspan(sizeof length);
    check(length <= text.size(), name_, ": is damaged: class name ", i, " is cut off");
    names_.emplace_back(reinterpret_cast<const char*>(text.data()), length);
    check_utf8(names_.back(), name_, "pack the data again");
    text = text.subspan(length);
  }
  check(text.empty(), name_, ": is damaged: ", text.size(), " bytes after the class names");
}

void PackedTable::check_record(int64_t index) const {
  const PackedRecord& r = record(index);
  const bool inside = r.bytes > 0 && r.offset >= kMagicBytes && r.offset <= end_.table_offset && r.bytes <= end_.table_offset - r.offset;
  check(inside, name_, ": is damaged: record ", index, " claims bytes ", r.offset, " to ", r.offset, " + ", r.bytes, " of ",
        end_.table_offset);
  check(r.label < end_.classes, name_, ": is damaged: record ", index, " has label ", r.label, " of ", end_.classes, " classes");
  constexpr uint32_t kMaxSide = 1 << 20;
  const bool file = r.height == 0 && r.width == 0 && r.channels == 0;
  const bool pixels = r.height > 0 && r.height <= kMaxSide && r.width <= kMaxSide && (r.channels == 1 || r.channels == 3) &&
                      uint64_t{r.height} * r.width * r.channels == r.bytes;
  check(file || pixels, name_, ": is damaged: record ", index, " claims ", r.height, " x ", r.width, " x ", r.channels, " pixels in ",
        r.bytes, " bytes");
}

StoredPicture PackedTable::picture(int64_t index) const {
  const PackedRecord& r = record(index);
  StoredPicture picture;
  picture.mapped = bytes_.subspan(r.offset, r.bytes);
  picture.height = static_cast<int>(r.height);
  picture.width = static_cast<int>(r.width);
  picture.channels = static_cast<int>(r.channels);
  picture.label = r.label;
  check(crc_of(picture.mapped) == r.crc32, name_, ": record ", index, " is damaged: wrong checksum");
  return picture;
}

std::string packed_table(const std::vector<std::string>& class_names, std::span<const PackedRecord> records, int64_t train,
                         uint64_t table_offset) {
  std::string table;
  for (const std::string& name : class_names) {
    const auto length = static_cast<uint32_t>(name.size());
    table.append(reinterpret_cast<const char*>(&length), sizeof length);
    table += name;
  }
  PackedEnd end;
  end.names_bytes = table.size();
  table.append(reinterpret_cast<const char*>(records.data()), records.size_bytes());
  end.table_crc32 = crc_of({reinterpret_cast<const uint8_t*>(table.data()), table.size()});
  end.table_offset = table_offset;
  end.file_bytes = table_offset + table.size() + sizeof end;
  end.train = static_cast<uint64_t>(train);
  end.test = records.size() - end.train;
  end.classes = static_cast<uint32_t>(class_names.size());
  end.crc32 = crc_of(end);
  return table.append(reinterpret_cast<const char*>(&end), sizeof end);
}

namespace {
struct Pack {
  MappedFile file;
  PackedTable table;
  explicit Pack(const std::string& path) : file(path), table(file.bytes(), path) {}
};

class Packed : public StoredDataset {
 public:
  Packed(std::shared_ptr<const Pack> pack, Half half, const DecodeOptions& decode)
      : StoredDataset(pack->table.class_names(), decode),
        pack_(std::move(pack)),
        first_(half == Half::train ? 0 : pack_->table.train()),
        size_(half == Half::train ? pack_->table.train() : pack_->table.test()) {}
  int64_t size() const override { return size_; }
  std::string describe(int64_t index) const override { return concat(pack_->file.path(), ": record ", first_ + index); }

 private:
  StoredPicture read(int64_t index) const override {
    const PackedRecord& record = pack_->table.record(first_ + index);
    pack_->file.fetch(record.offset, record.bytes);
    return pack_->table.picture(first_ + index);
  }
  std::shared_ptr<const Pack> pack_;
  int64_t first_, size_;
};

Image reduced(const Image& image, int64_t shorter) {
  const bool upright = image.width <= image.height;
  const int64_t height = upright ? shorter * image.height / image.width : shorter;
  const int64_t width = upright ? shorter : shorter * image.width / image.height;
  Image out{static_cast<int>(height), static_cast<int>(width), image.channels, std::vector<uint8_t>(height * width * image.channels)};
  resize(image, {0, 0, image.height, image.width}, height, width, {0, 0, height, width}, Interpolation::bicubic, out.pixels.data());
  return out;
}
}  // namespace

StoredPicture pack_picture(const Dataset& data, int64_t index, const PackOptions& options) {
  auto stored = data.stored(index);
  Dataset::Sample sample;
  if (stored)
    sample = {decode(*stored, data.describe(index), {options.max_pixels, 0}), stored->label};
  else
    sample = data.get(index);
  Image& image = sample.image;
  const bool file = stored && stored->is_file(), large = options.size > 0 && std::min(image.height, image.width) > options.size;
  if (file && !large && !options.raw) return std::move(*stored);
  if (large) image = reduced(image, options.size);
  StoredPicture out;
  out.label = sample.label;
  if (file && !options.raw) {
    out.memory = to_jpeg(image, kQuality);
  } else {
    out.height = image.height, out.width = image.width, out.channels = image.channels;
    out.memory = std::move(image.pixels);
  }
  return out;
}

DatasetPair open_packed(const DataOptions& options) {
  check(!std::filesystem::is_directory(options.path), "data.path: ", options.path, " is a folder; data.kind packed needs the packed file");
  const auto pack = std::make_shared<const Pack>(options.path);
  check(!options.train || pack->table.train() > 0, options.path, ": holds no pictures for training");
  check(pack->table.test() > 0, options.path, ": holds no test pictures");
  const auto half = [&](Half which, int64_t count) {
    return random_part(std::make_shared<Packed>(pack, which, decode_options(options)), count, options.seed, which, options.path);
  };
  return {options.train ? half(Half::train, options.train_size) : nullptr, half(Half::test, options.test_size)};
}

}  // namespace mesa
