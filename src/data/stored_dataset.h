// What data sets of picture files have in common: reading is theirs, decoding is here.
#pragma once
#include <utility>

#include "mesa/base/error.h"
#include "mesa/data/dataset.h"
#include "mesa/data/stages.h"

namespace mesa {

class StoredDataset : public Dataset {
 public:
  StoredDataset(std::vector<std::string> names, const DecodeOptions& decode) : names_(std::move(names)), decode_(decode) {}
  int64_t classes() const final { return static_cast<int64_t>(names_.size()); }
  const std::vector<std::string>& class_names() const final { return names_; }
  std::optional<StoredPicture> stored(int64_t index) const final {
    check(index >= 0 && index < size(), "sample ", index, " of a data set of ", size());
    const StageScope reading(Stage::read);
    return read(index);
  }
  Sample get(int64_t index) const final {
    const StoredPicture picture = *stored(index);
    return {decode(picture, describe(index), decode_), picture.label};
  }

 protected:
  /// `index` is in range.
  virtual StoredPicture read(int64_t index) const = 0;

 private:
  std::vector<std::string> names_;
  DecodeOptions decode_;
};

/// As image folders do it: random resized crops take down to 8 % of the area, a side of 0.28, so four times the model's side loses nothing
/// that they would show.
inline DecodeOptions decode_options(const DataOptions& options) {
  constexpr int64_t kDecodeMargin = 4;
  return {options.max_pixels, static_cast<int>(options.image_size * kDecodeMargin)};
}

}  // namespace mesa
