// CIFAR-10 and CIFAR-100 in their binary format (https://www.cs.toronto.edu/~kriz/cifar.html).
#include <algorithm>
#include <filesystem>

#include "class_names.h"
#include "mesa/base/error.h"
#include "mesa/base/files.h"
#include "mesa/data/dataset.h"
#include "mesa/data/formats.h"

namespace mesa {

int64_t check_cifar(const uint8_t* bytes, size_t size, const CifarLayout& layout, const std::string& name) {
  const size_t record = static_cast<size_t>(layout.record_bytes());
  check(size > 0, name, ": is empty");
  check(size % record == 0, name, ": is truncated or not a CIFAR-", layout.classes, " file: ", size, " bytes are not a multiple of the ",
        record, " of a record (", size % record, " bytes after record ", static_cast<int64_t>(size / record) - 1, "); fetch it again");
  for (size_t i = 0; i < size / record; ++i) {
    const int label = bytes[i * record + layout.label_bytes - 1];
    check(label < layout.classes, name, ": record ", i, " has label ", label, ", but labels go from 0 to ", layout.classes - 1,
          "; the file is damaged or of another kind");
  }
  return static_cast<int64_t>(size / record);
}

namespace {
namespace fs = std::filesystem;

struct CifarFile {
  std::string name;
  int64_t first;  // number of its first record
  std::vector<uint8_t> bytes;
};

class Cifar : public Dataset {
 public:
  Cifar(const std::vector<std::string>& paths, const CifarLayout& layout, std::vector<std::string> names)
      : layout_(layout), names_(std::move(names)) {
    for (const auto& path : paths) {
      files_.push_back({path, size_, read_bytes(path)});
      size_ += check_cifar(files_.back().bytes.data(), files_.back().bytes.size(), layout, path);
    }
  }
  int64_t size() const override { return size_; }
  int64_t classes() const override { return layout_.classes; }
  const std::vector<std::string>& class_names() const override { return names_; }

  Sample get(int64_t index) const override {
    const CifarFile& file = file_of(index);
    const uint8_t* record = file.bytes.data() + (index - file.first) * layout_.record_bytes();
    const uint8_t* planes = record + layout_.label_bytes;
    Image image{CifarLayout::kSide, CifarLayout::kSide, 3, std::vector<uint8_t>(CifarLayout::kPixelBytes)};
    for (int i = 0; i < CifarLayout::kPlane; ++i)
      for (int c = 0; c < 3; ++c) image.pixels[3 * i + c] = planes[c * CifarLayout::kPlane + i];
    return {std::move(image), record[layout_.label_bytes - 1]};
  }
  std::string describe(int64_t index) const override {
    const CifarFile& file = file_of(index);
    return concat(file.name, ": record ", index - file.first);
  }

 private:
  const CifarFile& file_of(int64_t index) const {
    check(index >= 0 && index < size_, "sample ", index, " of a data set of ", size_);
    auto after = std::upper_bound(files_.begin(), files_.end(), index, [](int64_t i, const CifarFile& file) { return i < file.first; });
    return *std::prev(after);
  }
  CifarLayout layout_;
  std::vector<std::string> names_;
  std::vector<CifarFile> files_;
  int64_t size_ = 0;
};

/// The names in a meta file, one a line, or "0", "1", ... where there is none.
std::vector<std::string> read_names(const fs::path& path, int classes) {
  if (!fs::exists(path)) return numbered_classes(classes);
  const auto names = read_class_names(path.string());
  check(static_cast<int>(names.size()) == classes, path.string(), ": has ", names.size(), " class names, the data set has ", classes,
        "; repair or remove the file");
  return names;
}

/// "data_batch_10.bin" comes after "data_batch_9.bin".
bool shorter_or_less(const std::string& a, const std::string& b) { return a.size() != b.size() ? a.size() < b.size() : a < b; }

std::vector<std::string> training_files(const fs::path& folder, const std::string& prefix) {
  std::vector<std::string> paths;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with(prefix) && name.ends_with(".bin")) paths.push_back(entry.path().string());
  }
  std::sort(paths.begin(), paths.end(), shorter_or_less);
  return paths;
}

std::shared_ptr<const Dataset> first_samples(std::shared_ptr<const Dataset> all, int64_t count, const char* key, const std::string& path) {
  check(count <= all->size(), key, " asks for ", count, " pictures, but ", path, " holds ", all->size());
  const int64_t size = all->size();
  return subset(std::move(all), 0, count > 0 ? count : size);
}
}  // namespace

DatasetPair open_cifar(const DataOptions& options) {
  const bool ten = options.kind == "cifar10";
  const CifarLayout& layout = ten ? kCifar10 : kCifar100;
  fs::path folder(options.path);
  check(fs::is_directory(folder), "data.path: ", options.path, " is not a folder");
  const fs::path inner = folder / (ten ? "cifar-10-batches-bin" : "cifar-100-binary");
  if (fs::is_directory(inner)) folder = inner;
  const auto train_files = training_files(folder, ten ? "data_batch" : "train");
  const fs::path test_file = folder / (ten ? "test_batch.bin" : "test.bin");
  const char* wanted = ten ? "data_batch_1.bin, ... and test_batch.bin (cifar-10-binary.tar.gz unpacked)"
                           : "train.bin and test.bin (cifar-100-binary.tar.gz unpacked)";
  check(!options.train || !train_files.empty(), folder.string(), ": no training files; ", options.kind, " needs ", wanted);
  check(fs::exists(test_file), test_file.string(), ": is missing; ", options.kind, " needs ", wanted);
  const auto names = read_names(folder / (ten ? "batches.meta.txt" : "fine_label_names.txt"), layout.classes);
  DatasetPair pair;
  if (options.train)
    pair.train = first_samples(std::make_shared<Cifar>(train_files, layout, names), options.train_size, "data.train_size", folder.string());
  pair.test = first_samples(std::make_shared<Cifar>(std::vector<std::string>{test_file.string()}, layout, names), options.test_size,
                            "data.test_size", test_file.string());
  return pair;
}

}  // namespace mesa
