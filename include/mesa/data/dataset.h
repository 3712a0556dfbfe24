// Labelled pictures by number: the built-in shapes, CIFAR, the MNIST family, and folders of photos.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "mesa/data/image.h"

namespace mesa {

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
  /// Where the sample lies, for logs: "data_batch_1.bin: record 17".
  virtual std::string describe(int64_t index) const = 0;
};

struct DataOptions {
  std::string kind = "shapes";  ///< one of dataset_kinds()
  std::string path;             ///< the folder of the files; unused by shapes
  /// How many pictures to train and test on; 0 takes all (shapes: 10,000 and 2,000). They split a set that comes in one piece.
  int64_t train_size = 0, test_size = 0;
  bool train = true;       ///< false: only the test half is opened; the training files need not be there
  uint64_t seed = 0;       ///< draws the shapes, the random part of a folder, and the split of an unsplit one
  int64_t image_size = 0;  ///< what the model will see, so that large JPEGs may be decoded at a fraction; 0 decodes in full
  int64_t classes = 0;     ///< idx: how many labels there are; 0 means 10
  int64_t max_pixels = DecodeOptions{}.max_pixels;  ///< refuse pictures that claim more
};

/// `train` is empty where DataOptions::train is false.
struct DatasetPair {
  std::shared_ptr<const Dataset> train, test;
};

/// shapes, cifar10, cifar100, idx, image_folder
const std::vector<std::string>& dataset_kinds();

/// Opens and validates both halves. Throws Error naming the file, the record and what to do; data/README.md shows the layouts.
DatasetPair open_datasets(const DataOptions& options);

// The kinds one by one; open_datasets chooses among them.
DatasetPair open_shapes(const DataOptions& options);
DatasetPair open_cifar(const DataOptions& options);
DatasetPair open_idx(const DataOptions& options);
DatasetPair open_image_folder(const DataOptions& options);

/// `count` samples of `whole`: those numbered from, from + 1, ... or, where `order` is given, order[from], order[from + 1], ...
std::shared_ptr<const Dataset> subset(std::shared_ptr<const Dataset> whole, int64_t from, int64_t count,
                                      std::shared_ptr<const std::vector<int64_t>> order = nullptr);

/// A permutation of 0..n-1 (Fisher-Yates) that depends on (seed, stream, step) alone.
std::vector<int64_t> permutation(int64_t n, uint64_t seed, const char* stream, uint64_t step);

}  // namespace mesa
