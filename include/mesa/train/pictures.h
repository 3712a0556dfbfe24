// Small pictures that a run leaves in its folder: what the model is trained on, and what it gets wrong.
#pragma once
#include <string>
#include <vector>

#include "mesa/data/image.h"
#include "mesa/data/loader.h"

namespace mesa {

inline constexpr size_t kMostPictures = 32;  ///< in one file
inline constexpr int kPictureSide = 80;      ///< pixels; larger pictures are reduced

struct LabelledPicture {
  int64_t index = 0;  ///< in the data set
  int64_t label = 0;
  std::string name;  ///< of the label's class
  int64_t predicted = -1;
  std::string predicted_name;
  double confidence = 0;     ///< probability that the model gives to `predicted`, 0 to 1
  std::vector<uint8_t> png;  ///< at most kPictureSide pixels wide and high
};

struct PictureList {
  int64_t epoch = 0, step = 0;  ///< when: epoch counts from 1
  bool predictions = false;
  std::vector<LabelledPicture> pictures;
};

/// The first kMostPictures of a loader's batch, u8 [B, H, W, C], as the model is about to see them.
PictureList sample_pictures(const Batch& batch, const std::vector<std::string>& class_names);

/// Collects the first kMostPictures of an evaluation whose label is not the class with the highest logit.
class MistakeFinder {
 public:
  explicit MistakeFinder(std::vector<std::string> class_names) : class_names_(std::move(class_names)) { list_.predictions = true; }
  /// logits: f32 [B, K] on the CPU. A row with a NaN has no prediction and is passed over.
  void take(const Batch& batch, const Tensor& logits);
  /// What was found, at this moment of training; the finder is empty then.
  PictureList finish(int64_t epoch, int64_t step);

 private:
  std::vector<std::string> class_names_;
  PictureList list_;
};

/// JSON with the pictures in it as base64, replaced in one step. Throws Error on I/O errors.
void write_pictures(const std::string& path, const PictureList& list);
/// Throws Error naming the file where it is missing, damaged, or holds more or larger pictures than write_pictures leaves.
PictureList read_pictures(const std::string& path);

std::string to_base64(const std::vector<uint8_t>& bytes);
/// Throws Error for anything but whole base64 with its padding.
std::vector<uint8_t> from_base64(const std::string& text);

}  // namespace mesa
