// From a decoded picture to the bytes that the model sees: random crops, flips, operations, colours and erasing to train, resize and centre
// crop to evaluate.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "mesa/base/random.h"
#include "mesa/data/augment.h"
#include "mesa/data/erasing.h"
#include "mesa/data/resize.h"

namespace mesa {

/// How training crops: `none` as evaluation does; `pad` shifts the picture by up to crop_padding pixels over black (CIFAR);
/// `resized` takes a random part of random area and shape (ImageNet); `simple` resizes the shorter side to the model's and takes a random
/// square of what then lies inside crop_padding pixels of reflection on each side (DeiT III's simple random crop).
enum class Crop : uint8_t { none, pad, resized, simple };
/// "none", "pad", "resized" or "simple"; anything else throws Error naming `key`.
Crop parse_crop(const std::string& text, const std::string& key);

/// How far colours are moved: factors in [max(0, 1 - x), 1 + x], and a hue turned by up to this share of a whole turn, at most 1/2
/// (torchvision's ColorJitter).
struct ColorJitter {
  double brightness = 0, contrast = 0, saturation = 0, hue = 0;
  ColorJitter() = default;
  /// timm's one number: the hue stays.
  ColorJitter(double strength) : ColorJitter(strength, strength, strength, 0) {}
  ColorJitter(double brightness, double contrast, double saturation, double hue)
      : brightness(brightness), contrast(contrast), saturation(saturation), hue(hue) {}
  bool on() const { return brightness > 0 || contrast > 0 || saturation > 0 || hue > 0; }
  bool operator==(const ColorJitter&) const = default;
};

struct TransformOptions {
  int64_t image_size = 32;  ///< pixels of the square output
  int64_t channels = 3;     ///< of the output: 1 (gray) or 3
  Crop crop = Crop::none;
  int64_t crop_padding = 4;                       ///< pixels, for Crop::pad and Crop::simple (there less than half of image_size)
  std::array<double, 2> scale{0.08, 1.0};         ///< share of the area, for Crop::resized
  std::array<double, 2> ratio{3.0 / 4, 4.0 / 3};  ///< width / height, log-uniform, for Crop::resized
  double flip = 0.5;                              ///< probability of a mirror image in training
  double vflip = 0;                               ///< probability of an upside-down one
  AugmentPolicy augment{};                        ///< RandAugment or 3-Augment
  ColorJitter color_jitter{};                     ///< unless `augment` replaces it
  double grayscale = 0;                           ///< probability
  double blur = 0;                                ///< probability of a Gaussian blur of a standard deviation in 0.1..2 pixels
  Erasing erasing{};
  Interpolation interpolation = Interpolation::bicubic;
  bool random_interpolation = false;  ///< in training bilinear or bicubic, drawn for each resize and each operation
  double crop_pct = 1.0;              ///< evaluation: the shorter side becomes floor(image_size / crop_pct), then the centre is cut out
  bool eval_flip = false;             ///< evaluation: logits are the mean over the picture and its mirror image
  /// Of the pixels as they stand in [0, 1], one value a channel. Kept here with the rest of the preprocessing; a kernel applies them.
  std::vector<float> mean{0.5f, 0.5f, 0.5f}, std{0.5f, 0.5f, 0.5f};

  /// Throws Error naming the field that is out of range.
  void validate() const;
  /// True if nothing that follows the flips in training asks where a pixel is.
  bool flips_last() const {
    return augment.choices.empty() && !color_jitter.on() && grayscale == 0 && blur == 0 && erasing.probability == 0;
  }
  /// Bytes of one output picture.
  int64_t bytes() const { return image_size * image_size * channels; }
};

/// The random numbers of one picture in one epoch, or of its `repeat`-th appearance there: they depend on these alone, never on threads or
/// batches.
RandomStream augmentation_stream(uint64_t seed, int64_t epoch, int64_t index, int64_t repeat = 0);

/// The random picture for training; writes options.bytes() bytes, [image_size, image_size, channels], to `out`.
/// In timm's order: crop, flips, `augment`, colour jitter, grayscale, blur, erasing. The random resized crop, its ten tries and its
/// fallback are timm's (RandomResizedCropAndInterpolation); colours as Pillow's ImageEnhance. With options.flips_last() and `mirrored` the
/// picture stays as it is where it should be mirrored, *mirrored says so (1, else 0), and whoever reads it reads from right to left.
void transform_for_training(const Image& image, const TransformOptions& options, RandomStream& random, uint8_t* out,
                            uint8_t* mirrored = nullptr);

/// The same picture every time: resize of the shorter side, centre crop.
void transform_for_evaluation(const Image& image, const TransformOptions& options, uint8_t* out);

}  // namespace mesa
