#include "mesa/data/dataset.h"

#include <algorithm>
#include <filesystem>
#include <numeric>

#include "mesa/base/error.h"
#include "mesa/base/random.h"

namespace mesa {

const std::vector<std::string>& dataset_kinds() {
  static const std::vector<std::string> kinds{"shapes", "cifar10", "cifar100", "idx", "image_folder", "shards", "packed"};
  return kinds;
}

DatasetPair open_datasets(const DataOptions& options) try {
  check(options.train_size >= 0 && options.test_size >= 0, "data.train_size and data.test_size must not be negative, they are ",
        options.train_size, " and ", options.test_size);
  check(options.max_pixels > 0, "data.max_pixels must be positive, it is ", options.max_pixels);
  if (options.kind == "shapes") return open_shapes(options);
  const std::string near = nearest(options.kind, dataset_kinds());
  const auto& kinds = dataset_kinds();
  const std::string list = std::accumulate(kinds.begin() + 1, kinds.end(), kinds[0], [](auto a, auto& b) { return a + ", " + b; });
  const bool known = std::find(kinds.begin(), kinds.end(), options.kind) != kinds.end();
  check(known, "data.kind: unknown data set '", options.kind, "'", near.empty() ? "" : "; did you mean '" + near + "'?", " (", list, ")");
  check(!options.path.empty(), "data.path is empty: the data set '", options.kind, "' needs ",
        options.kind == "packed" ? "its file" : "the folder of its files");
  if (options.kind == "idx") return open_idx(options);
  if (options.kind == "image_folder") return open_image_folder(options);
  if (options.kind == "shards") return open_shards(options);
  if (options.kind == "packed") return open_packed(options);
  return open_cifar(options);
} catch (const std::filesystem::filesystem_error& error) {
  fail("data.path cannot be read: ", error.what());
}

std::vector<int64_t> permutation(int64_t n, uint64_t seed, const char* stream, uint64_t step) {
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), int64_t{0});
  RandomStream random(RandomKey::of(seed, stream, step));
  for (int64_t i = n - 1; i > 0; --i) std::swap(order[i], order[random.below(static_cast<uint64_t>(i) + 1)]);
  return order;
}

namespace {
class Subset : public Dataset {
 public:
  Subset(std::shared_ptr<const Dataset> whole, int64_t from, int64_t count, std::shared_ptr<const std::vector<int64_t>> order)
      : whole_(std::move(whole)), from_(from), count_(count), order_(std::move(order)) {}
  int64_t size() const override { return count_; }
  int64_t classes() const override { return whole_->classes(); }
  const std::vector<std::string>& class_names() const override { return whole_->class_names(); }
  Sample get(int64_t index) const override { return whole_->get(in_whole(index)); }
  std::optional<StoredPicture> stored(int64_t index) const override { return whole_->stored(in_whole(index)); }
  std::string describe(int64_t index) const override { return whole_->describe(in_whole(index)); }

 private:
  int64_t in_whole(int64_t index) const {
    check(index >= 0 && index < count_, "sample ", index, " of a data set of ", count_);
    return order_ ? (*order_)[from_ + index] : from_ + index;
  }
  std::shared_ptr<const Dataset> whole_;
  int64_t from_, count_;
  std::shared_ptr<const std::vector<int64_t>> order_;
};
}  // namespace

std::shared_ptr<const Dataset> subset(std::shared_ptr<const Dataset> whole, int64_t from, int64_t count,
                                      std::shared_ptr<const std::vector<int64_t>> order) {
  const int64_t size = order ? static_cast<int64_t>(order->size()) : whole->size();
  check(from >= 0 && count >= 0 && count <= size - from, "samples ", from, " to ", from + count, " of a data set of ", size);
  if (from == 0 && count == whole->size() && !order) return whole;
  return std::make_shared<Subset>(std::move(whole), from, count, std::move(order));
}

std::shared_ptr<const Dataset> random_part(std::shared_ptr<const Dataset> all, int64_t count, uint64_t seed, Half half,
                                           const std::string& path) {
  const bool train = half == Half::train;
  check(count <= all->size(), train ? "data.train_size" : "data.test_size", " asks for ", count, " pictures, but ", path, " holds ",
        all->size());
  if (count == 0 || count == all->size()) return all;
  auto order =
      std::make_shared<const std::vector<int64_t>>(permutation(all->size(), seed, train ? "data.train_part" : "data.test_part", 0));
  return subset(std::move(all), 0, count, std::move(order));
}

Image decode(const StoredPicture& picture, const std::string& name, const DecodeOptions& options) {
  const auto bytes = picture.bytes();
  if (picture.is_file()) return decode_image(bytes.data(), bytes.size(), name, options);
  return {picture.height, picture.width, picture.channels, {bytes.begin(), bytes.end()}};
}

}  // namespace mesa
