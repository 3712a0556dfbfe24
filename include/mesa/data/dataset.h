// Labelled pictures by number: the built-in shapes, CIFAR, the MNIST family, folders of photos, tar shards, and packed files.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "mesa/data/image.h"

namespace mesa {

/// A picture as it lies on the disk: the bytes of a JPEG or PNG file, or, where height > 0, of its pixels.
struct StoredPicture {
  std::vector<uint8_t> memory;      ///< the bytes, or
  std::span<const uint8_t> mapped;  ///< where the data set keeps them
  int height = 0, width = 0, channels = 0;
  int64_t label = 0;
  std::span<const uint8_t> bytes() const { return mapped.empty() ? std::span<const uint8_t>(memory) : mapped; }
  bool is_file() const { return height == 0; }
};
/// The picture; `name` stands in the errors.
Image decode(const StoredPicture& picture, const std::string& name, const DecodeOptions& options);

/// A fixed list of labelled pictures. Every method may be called from several threads at once.
class Dataset {
 public:
  struct Sample {
    Image image;
    int64_t label = 0;
  };

  virtual ~Dataset() = default;
  virtual int64_t size() const = 0;
  virtual int64_t classes() const = 0;
  /// One name a class, in the order of the labels.
  virtual const std::vector<std::string>& class_names() const = 0;
  /// Picture number `index`. Throws Error naming the file and the record where it is damaged.
  virtual Sample get(int64_t index) const = 0;
  /// The same before it is decoded, from data sets that keep picture files; the others have nothing to show.
  virtual std::optional<StoredPicture> stored(int64_t) const { return std::nullopt; }
  /// Where the sample lies, for logs: "data_batch_1.bin: record 17".
  virtual std::string describe(int64_t index) const = 0;
};

struct DataOptions {
  std::string kind = "shapes";  ///< one of dataset_kinds()
  std::string path{};           ///< the folder of the files, or the packed file; unused by shapes
  /// How many pictures to train and test on; 0 takes all (shapes: 10,000 and 2,000). They split a set that comes in one piece.
  int64_t train_size = 0, test_size = 0;
  bool train = true;       ///< false: only the test half is opened; the training files need not be there
  uint64_t seed = 0;       ///< draws the shapes, the random part of a folder, and the split of an unsplit one
  int64_t image_size = 0;  ///< what the model will see, so that large JPEGs may be decoded at a fraction; 0 decodes in full
  int64_t classes = 0;     ///< idx, shards: how many labels there are; 0 means 10 of idx, and what the labels tell of shards
  int64_t max_pixels = DecodeOptions{}.max_pixels;  ///< refuse pictures that claim more
};

/// `train` is empty where DataOptions::train is false.
struct DatasetPair {
  std::shared_ptr<const Dataset> train, test;
};

/// shapes, cifar10, cifar100, idx, image_folder, shards, packed
const std::vector<std::string>& dataset_kinds();

/// Opens and validates both halves. Throws Error naming the file, the record and what to do; data/README.md shows the layouts.
DatasetPair open_datasets(const DataOptions& options);

// The kinds one by one; open_datasets chooses among them.
DatasetPair open_shapes(const DataOptions& options);
DatasetPair open_cifar(const DataOptions& options);
DatasetPair open_idx(const DataOptions& options);
DatasetPair open_image_folder(const DataOptions& options);
DatasetPair open_shards(const DataOptions& options);
DatasetPair open_packed(const DataOptions& options);

/// `count` samples of `whole`: those numbered from, from + 1, ... or, where `order` is given, order[from], order[from + 1], ...
std::shared_ptr<const Dataset> subset(std::shared_ptr<const Dataset> whole, int64_t from, int64_t count,
                                      std::shared_ptr<const std::vector<int64_t>> order = nullptr);

enum class Half : uint8_t { train, test };
/// All of a half, or `count` random samples of it that depend on the seed alone (the first ones would often be of one class); 0 takes all.
/// Throws Error naming data.train_size or data.test_size and `path` where there are fewer.
std::shared_ptr<const Dataset> random_part(std::shared_ptr<const Dataset> all, int64_t count, uint64_t seed, Half half,
                                           const std::string& path);

/// A permutation of 0..n-1 (Fisher-Yates) that depends on (seed, stream, step) alone.
std::vector<int64_t> permutation(int64_t n, uint64_t seed, const char* stream, uint64_t step);

}  // namespace mesa
