// The MNIST family: IDX files (http://yann.lecun.com/exdb/mnist), plain or gzip-compressed.
#include <zlib.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <optional>

#include "mesa/base/error.h"
#include "mesa/base/files.h"
#include "mesa/data/dataset.h"
#include "mesa/data/formats.h"

namespace mesa {

namespace {
namespace fs = std::filesystem;

/// Deflate shrinks at most 1032 times: what claims to hold more than this a byte is lying.
constexpr uint64_t kMaxExpansion = 1032;

/// Reads bytes in order from a block of memory that may be gzip-compressed.
class ByteSource {
 public:
  ByteSource(const uint8_t* bytes, size_t size, const std::string& name)
      : name_(name), compressed_(size >= 2 && bytes[0] == 0x1F && bytes[1] == 0x8B) {
    stream_.next_in = const_cast<uint8_t*>(bytes);
    left_ = size;
    if (compressed_) check(inflateInit2(&stream_, 16 + MAX_WBITS) == Z_OK, name_, ": zlib cannot start");
  }
  ~ByteSource() {
    if (compressed_) inflateEnd(&stream_);
  }
  ByteSource(const ByteSource&) = delete;
  ByteSource& operator=(const ByteSource&) = delete;

  bool compressed() const { return compressed_; }

  /// Up to `count` bytes; fewer only at the end. Throws where the compressed data are damaged or end too early.
  size_t read(uint8_t* to, size_t count) {
    size_t done = 0;
    while (done < count && !finished_) {
      const size_t wanted = std::min<size_t>(count - done, 1u << 30);
      done += compressed_ ? inflate_some(to + done, wanted) : copy_some(to + done, wanted);
    }
    return done;
  }

 private:
  size_t copy_some(uint8_t* to, size_t wanted) {
    const size_t n = std::min(wanted, left_);
    if (n > 0) std::memcpy(to, stream_.next_in, n);
    stream_.next_in += n;
    left_ -= n;
    finished_ = left_ == 0;
    return n;
  }

  size_t inflate_some(uint8_t* to, size_t wanted) {
    if (stream_.avail_in == 0) {
      stream_.avail_in = static_cast<uInt>(std::min<size_t>(left_, 1u << 30));
      left_ -= stream_.avail_in;
    }
    stream_.next_out = to;
    stream_.avail_out = static_cast<uInt>(wanted);
    const int result = inflate(&stream_, Z_NO_FLUSH);
    if (result == Z_STREAM_END)
      next_member();
    else if (result == Z_BUF_ERROR || (result == Z_OK && stream_.avail_out > 0 && stream_.avail_in == 0 && left_ == 0))
      check(false, name_, ": the gzip data end too early; fetch the file again");
    else
      check(result == Z_OK, name_, ": the gzip data are damaged (", stream_.msg ? stream_.msg : "no reason given", ")");
    return wanted - stream_.avail_out;
  }

  /// gzip files may be concatenations; anything else behind the end of one is damage.
  void next_member() {
    finished_ = stream_.avail_in == 0 && left_ == 0;
    if (!finished_) check(inflateReset(&stream_) == Z_OK, name_, ": zlib cannot go on");
  }

  const std::string& name_;
  bool compressed_;
  bool finished_ = false;
  z_stream stream_{};
  size_t left_;
};

int64_t read_extent(ByteSource& source, const std::string& name) {
  uint8_t b[4];
  check(source.read(b, 4) == 4, name, ": is truncated inside its header");
  return int64_t{b[0]} << 24 | b[1] << 16 | b[2] << 8 | b[3];
}
}  // namespace

IdxArray parse_idx(const uint8_t* bytes, size_t size, const std::string& name) {
  check(size > 0, name, ": is empty");
  ByteSource source(bytes, size, name);
  uint8_t magic[4];
  check(source.read(magic, 4) == 4, name, ": is truncated inside its header");
  check(magic[0] == 0 && magic[1] == 0, name, ": is not an IDX file (wrong magic number)");
  check(magic[2] == 8, name, ": holds elements of IDX type ", int{magic[2]}, "; only unsigned bytes (type 8) are read");
  check(magic[3] >= 1 && magic[3] <= 4, name, ": has ", int{magic[3]}, " dimensions; 1 to 4 are read");
  IdxArray array;
  uint64_t total = 1;
  const uint64_t most = source.compressed() ? size * kMaxExpansion : size;
  for (int i = 0; i < magic[3]; ++i) {
    array.dims.push_back(read_extent(source, name));
    check(array.dims.back() > 0, name, ": dimension ", i, " is 0");
    const auto extent = static_cast<uint64_t>(array.dims.back());
    check(extent <= most / total, name, ": is truncated or lies: its header claims more elements than ", size, " bytes can hold");
    total *= extent;
  }
  array.values.resize(total);
  const size_t got = source.read(array.values.data(), total);
  check(got == total, name, ": is truncated: ", got, " of ", total, " elements");
  uint8_t extra;
  check(source.read(&extra, 1) == 0, name, ": has bytes after its ", total, " elements; the file is damaged");
  return array;
}

namespace {
class IdxPair : public Dataset {
 public:
  IdxPair(const std::string& images_path, const std::string& labels_path, int64_t classes) : name_(images_path) {
    images_ = read(images_path);
    const IdxArray labels = read(labels_path);
    check(images_.dims.size() >= 3, images_path, ": has ", images_.dims.size(), " dimensions; pictures need 3 or 4");
    check(labels.dims.size() == 1, labels_path, ": has ", labels.dims.size(), " dimensions; labels need 1");
    check(images_.dims[0] == labels.dims[0], labels_path, ": has ", labels.dims[0], " labels for the ", images_.dims[0], " pictures of ",
          images_path);
    channels_ = images_.dims.size() == 4 ? images_.dims[3] : 1;
    check(channels_ == 1 || channels_ == 3, images_path, ": has ", channels_, " channels; 1 or 3 are read");
    for (size_t i = 0; i < labels.values.size(); ++i)
      check(labels.values[i] < classes, labels_path, ": record ", i, " has label ", int{labels.values[i]}, ", but labels go from 0 to ",
            classes - 1, " (model.classes)");
    labels_ = labels.values;
    for (int64_t i = 0; i < classes; ++i) names_.push_back(std::to_string(i));
  }
  int64_t size() const override { return images_.dims[0]; }
  int64_t classes() const override { return static_cast<int64_t>(names_.size()); }
  const std::vector<std::string>& class_names() const override { return names_; }
  Sample get(int64_t index) const override {
    check(index >= 0 && index < size(), "sample ", index, " of a data set of ", size());
    const int64_t bytes = images_.dims[1] * images_.dims[2] * channels_;
    const auto first = images_.values.begin() + index * bytes;
    return {{static_cast<int>(images_.dims[1]), static_cast<int>(images_.dims[2]), static_cast<int>(channels_), {first, first + bytes}},
            labels_[index]};
  }
  std::string describe(int64_t index) const override { return concat(name_, ": record ", index); }

 private:
  static IdxArray read(const std::string& path) {
    const auto bytes = read_bytes(path);
    return parse_idx(bytes.data(), bytes.size(), path);
  }
  std::string name_;
  IdxArray images_;
  std::vector<uint8_t> labels_;
  int64_t channels_ = 1;
  std::vector<std::string> names_;
};

/// The file under its usual names: with "-idx3-ubyte" or ".idx3-ubyte", plain or with ".gz".
std::optional<std::string> find_file(const fs::path& folder, const std::string& stem, int rank) {
  for (const char* separator : {"-", "."})
    for (const char* ending : {"", ".gz"}) {
      const fs::path path = folder / concat(stem, separator, "idx", rank, "-ubyte", ending);
      if (fs::exists(path)) return path.string();
    }
  return std::nullopt;
}

std::shared_ptr<const Dataset> open_pair(const fs::path& folder, const std::string& prefix, int64_t classes) {
  auto images = find_file(folder, prefix + "-images", 3);
  if (!images) images = find_file(folder, prefix + "-images", 4);
  const auto labels = find_file(folder, prefix + "-labels", 1);
  if (!images && !labels) return nullptr;
  check(images.has_value(), folder.string(), ": has ", labels.value_or(""), " but not ", prefix, "-images-idx3-ubyte[.gz]");
  check(labels.has_value(), folder.string(), ": has ", images.value_or(""), " but not ", prefix, "-labels-idx1-ubyte[.gz]");
  return std::make_shared<IdxPair>(*images, *labels, classes);
}
}  // namespace

DatasetPair open_idx(const DataOptions& options) {
  const fs::path folder(options.path);
  check(fs::is_directory(folder), "data.path: ", options.path, " is not a folder");
  check(options.classes >= 0 && options.classes <= 256, "model.classes must lie in 1..256 for idx, it is ", options.classes);
  const int64_t classes = options.classes == 0 ? 10 : options.classes;
  const auto test = open_pair(folder, "t10k", classes);
  const int64_t wanted[] = {options.train_size, options.test_size};
  const auto test_part = [&] {
    check(wanted[1] <= test->size(), "data.test_size asks for ", wanted[1], " pictures, but ", options.path, " holds ", test->size());
    return subset(test, 0, wanted[1] > 0 ? wanted[1] : test->size());
  };
  // For evaluation one pair alone is the test set, unless the sizes say that training had a part of it.
  if (!options.train && test && (wanted[0] == 0 || wanted[1] == 0)) return {nullptr, test_part()};
  const auto train = open_pair(folder, "train", classes);
  check(train || test, options.path,
        ": no IDX files; needed are train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and ",
        "t10k-labels-idx1-ubyte, plain or .gz");
  if (!train || !test) {
    const auto whole = train ? train : test;
    check(wanted[0] > 0 && wanted[1] > 0, options.path, ": only one pair of files is there, ", whole->size(),
          " pictures: set data.train_size and data.test_size to split it (the first train_size train, the next test_size test)");
    check(wanted[0] <= whole->size() && wanted[1] <= whole->size() - wanted[0], options.path, ": holds ", whole->size(),
          " pictures, fewer than data.train_size ", wanted[0], " + data.test_size ", wanted[1]);
    return {subset(whole, 0, wanted[0]), subset(whole, wanted[0], wanted[1])};
  }
  check(wanted[0] <= train->size(), "data.train_size asks for ", wanted[0], " pictures, but ", options.path, " holds ", train->size());
  return {subset(train, 0, wanted[0] > 0 ? wanted[0] : train->size()), test_part()};
}

}  // namespace mesa
