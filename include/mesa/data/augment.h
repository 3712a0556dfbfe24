// RandAugment and 3-Augment: random operations from a list, described by timm's strings.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "mesa/base/random.h"
#include "mesa/data/pixels.h"

namespace mesa {

/// timm's operations, by their names there (AutoContrast, PosterizeIncreasing, ...).
enum class AugmentOp : uint8_t {
  auto_contrast,
  equalize,
  invert,
  rotate,
  posterize,
  posterize_increasing,
  solarize,
  solarize_increasing,
  solarize_add,
  color,
  color_increasing,
  contrast,
  contrast_increasing,
  brightness,
  brightness_increasing,
  sharpness,
  sharpness_increasing,
  shear_x,
  shear_y,
  translate_x,
  translate_y,
  desaturate,
  gaussian_blur,
  gaussian_blur_rand
};

/// Picks `layers` operations and applies each with a probability and a random magnitude (Cubuk et al., "RandAugment", CVPR Workshops
/// 2020, with timm's additions; 3-Augment of Touvron et al., "DeiT III", ECCV 2022, is the special case of one operation out of three).
struct AugmentPolicy {
  struct Choice {
    AugmentOp op;
    double weight = 1;      ///< of being picked
    double magnitude = 10;  ///< on the scale of 0 to 10, the mean where it is random
  };
  std::vector<Choice> choices;  ///< none: the picture stays
  bool repeats = true;          ///< one operation may be picked twice
  int64_t layers = 2;
  double probability = 0.5;
  /// Of the normal distribution around the magnitude; infinite: uniform from 0 to the magnitude.
  double magnitude_std = 0;
  double magnitude_max = 10;  ///< magnitudes are clamped to [0, magnitude_max]
  bool color_jitter = true;   ///< whether colour jitter comes after it, if that is on
};

/// "" is none, "3a" 3-Augment, "rand-m9-mstd0.5-inc1" RandAugment with parts in any order:
///   m<0..100>     magnitude (10)                      n<1..16>    operations a picture (2)
///   mstd<number>  its standard deviation (0); above 100, or mstdinf: uniform between 0 and m
///   mmax<1..100>  largest magnitude (10)              p<0..1>     probability of each operation (0.5)
///   inc1          operations whose strength rises with the magnitude      t<weights|3a|3aw>  another list of operations
/// Throws Error "<key>: ..." for anything else, with what is allowed.
AugmentPolicy parse_augment(const std::string& text, const std::string& key);

/// timm's level functions: the argument that operation takes at this magnitude, with a random sign where it has one.
double augment_argument(AugmentOp op, double magnitude, RandomStream& random);

/// Applies one operation: `argument` in its own unit (degrees, bits, a threshold, a factor, a share of the picture's side, pixels).
void apply_augment_op(AugmentOp op, double argument, Interpolation interpolation, const Color& fill, const Pixels& p);

/// How geometric operations sample, and what fills the places that come in from outside.
struct AugmentSampling {
  Interpolation interpolation = Interpolation::bicubic;
  bool random_interpolation = false;  ///< bilinear or bicubic, drawn for each operation
  Color fill{128, 128, 128};
};
void apply_augment(const AugmentPolicy& policy, const AugmentSampling& sampling, RandomStream& random, const Pixels& p);

}  // namespace mesa
