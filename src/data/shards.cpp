// Tar archives in WebDataset's layout, indexed when they are opened, so that samples come in any order.
#include <algorithm>
#include <array>
#include <filesystem>

#include "class_names.h"
#include "mesa/base/files.h"
#include "mesa/base/threads.h"
#include "mesa/data/tar.h"
#include "stored_dataset.h"

namespace mesa {

namespace {
namespace fs = std::filesystem;

/// Headers stand before contents that are not wanted yet: a page at a time serves a header, a label and the header behind it.
class PagedReader {
 public:
  explicit PagedReader(const InputFile& file) : file_(file) {}
  void operator()(uint64_t offset, uint8_t* to, size_t count) {
    if (count > page_.size() / 2) return file_.read(offset, to, count);
    if (offset < first_ || offset + count > first_ + held_) {
      first_ = offset;
      held_ = std::min<uint64_t>(page_.size(), file_.size() - offset);
      file_.read(first_, page_.data(), held_);
    }
    std::copy_n(page_.data() + (offset - first_), count, to);
  }

 private:
  const InputFile& file_;
  std::array<uint8_t, 4096> page_;
  uint64_t first_ = 0, held_ = 0;
};

struct Shard {
  InputFile file;
  std::vector<ShardSample> samples;
  int64_t first = 0;  // number of its first sample
};

std::vector<Shard> open_all(const std::vector<std::string>& paths) {
  constexpr int64_t kThreads = 16;  // waiting for disks, not computing
  allow_open_files(static_cast<int64_t>(paths.size()));
  std::vector<Shard> shards;
  for (const auto& path : paths) shards.push_back({InputFile(path), {}, 0});
  parallel_for(static_cast<int64_t>(shards.size()), kThreads, [&](int64_t i) {
    PagedReader pages(shards[i].file);
    shards[i].samples = index_shard([&](uint64_t offset, uint8_t* to, size_t count) { pages(offset, to, count); }, shards[i].file.size(),
                                    shards[i].file.path());
  });
  for (size_t i = 1; i < shards.size(); ++i) shards[i].first = shards[i - 1].first + static_cast<int64_t>(shards[i - 1].samples.size());
  return shards;
}

int64_t largest_label(const std::vector<Shard>& shards) {
  int64_t most = -1;
  for (const Shard& shard : shards)
    for (const ShardSample& sample : shard.samples) most = std::max(most, sample.label);
  return most;
}

class Shards : public StoredDataset {
 public:
  Shards(std::vector<Shard> shards, std::vector<std::string> names, const DecodeOptions& decode)
      : StoredDataset(std::move(names), decode), shards_(std::move(shards)) {
    for (const Shard& shard : shards_)
      for (const ShardSample& sample : shard.samples)
        check(sample.label < classes(), shard.file.path(), ": ", sample.name, " has label ", sample.label, ", but labels go from 0 to ",
              classes() - 1, " (classes.txt, or model.classes)");
  }
  int64_t size() const override { return shards_.back().first + static_cast<int64_t>(shards_.back().samples.size()); }
  std::string describe(int64_t index) const override {
    const auto& [shard, sample] = at(index);
    return concat(shard.file.path(), ": ", sample.name);
  }

 private:
  StoredPicture read(int64_t index) const override {
    const auto& [shard, sample] = at(index);
    StoredPicture picture;
    picture.label = sample.label;
    check(sample.size <= static_cast<uint64_t>(kMaxImageFile), describe(index), ": has ", sample.size, " bytes; at most ", kMaxImageFile,
          " are read");
    picture.memory.resize(sample.size);
    shard.file.read(sample.offset, picture.memory.data(), picture.memory.size());
    return picture;
  }
  std::pair<const Shard&, const ShardSample&> at(int64_t index) const {
    check(index >= 0 && index < size(), "sample ", index, " of a data set of ", size());
    const auto after =
        std::upper_bound(shards_.begin(), shards_.end(), index, [](int64_t i, const Shard& shard) { return i < shard.first; });
    const Shard& shard = *std::prev(after);
    return {shard, shard.samples[index - shard.first]};
  }
  std::vector<Shard> shards_;
};

/// Whether `word` is one of the parts of "imagenet-train-0001.tar" between dots, dashes and underscores.
bool has_word(const std::string& name, const std::string& word) {
  for (size_t at = 0; at <= name.size();) {
    const size_t end = std::min(name.find_first_of("-_.", at), name.size());
    if (name.compare(at, end - at, word) == 0) return true;
    at = end + 1;
  }
  return false;
}

/// The archives of a half, in the order of their names: in a folder of its name, or beside the others with the name in theirs.
std::vector<std::string> find_shards(const fs::path& folder, const std::string& half) {
  std::vector<std::string> paths;
  const bool own = fs::is_directory(folder / half);
  for (const auto& entry : fs::directory_iterator(own ? folder / half : folder)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with(".") || entry.is_directory() || !(own || has_word(name, half))) continue;
    check(!name.ends_with(".tar.gz") && !name.ends_with(".tgz"), entry.path().string(),
          ": is compressed; unpack it (gunzip), as shards are read in any order");
    if (name.ends_with(".tar")) paths.push_back(entry.path().string());
  }
  std::sort(paths.begin(), paths.end());
  return paths;
}

std::vector<std::string> class_names(const DataOptions& options, int64_t largest) {
  const fs::path file = fs::path(options.path) / "classes.txt";
  if (fs::exists(file)) return read_class_names(file.string());
  return numbered_classes(options.classes > 0 ? options.classes : largest + 1);
}
}  // namespace

DatasetPair open_shards(const DataOptions& options) {
  const fs::path folder(options.path);
  check(fs::is_directory(folder), "data.path: ", options.path, " is not a folder");
  const auto train_paths = options.train ? find_shards(folder, "train") : std::vector<std::string>();
  std::vector<std::string> test_paths;
  for (const char* half : {"val", "validation", "test"})
    if (test_paths.empty()) test_paths = find_shards(folder, half);
  const char* layout = "; shards lie in train/*.tar and val/*.tar (or validation/, test/), or side by side as train-0000.tar, val-0000.tar";
  check(!options.train || !train_paths.empty(), options.path, ": holds no training shards", layout);
  check(!test_paths.empty(), options.path, ": holds no test shards", layout);
  std::vector<Shard> train = open_all(train_paths), test = open_all(test_paths);
  const auto names = class_names(options, std::max(largest_label(train), largest_label(test)));
  DatasetPair pair;
  if (options.train)
    pair.train = random_part(std::make_shared<Shards>(std::move(train), names, decode_options(options)), options.train_size, options.seed,
                             Half::train, options.path);
  pair.test = random_part(std::make_shared<Shards>(std::move(test), names, decode_options(options)), options.test_size, options.seed,
                          Half::test, options.path);
  return pair;
}

}  // namespace mesa
