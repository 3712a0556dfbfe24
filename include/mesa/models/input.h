// What every model of images says of its input and output.
#pragma once
#include "mesa/base/error.h"
#include "mesa/base/shape.h"

namespace mesa {

struct ImageConfig {
  int64_t image_size = 224;  ///< height, and width where that is 0
  int64_t image_width = 0;
  int64_t channels = 3, classes = 1000;

  int64_t height_px() const { return image_size; }
  int64_t width_px() const { return image_width > 0 ? image_width : image_size; }
  /// Throws Error unless `images` is [B, channels, height, width].
  void check_images(const Shape& images) const {
    check(images.rank() == 4 && images == Shape({images[0], channels, height_px(), width_px()}), "the model takes [B, ", channels, ", ",
          height_px(), ", ", width_px(), "], not ", images);
  }
};

}  // namespace mesa
