// Operations on the bytes of a picture, in place. Those with a name of Pillow's give its bytes, bit for bit (compared with Pillow 13).
#pragma once
#include <array>
#include <cstdint>
#include <vector>

#include "mesa/data/resize.h"

namespace mesa {

/// The pixels of a picture somewhere in memory: data[(y * width + x) * channels + c], 1 channel (Pillow's mode L) or 3 (RGB).
struct Pixels {
  uint8_t* data = nullptr;
  int64_t height = 0, width = 0, channels = 0;
  int64_t bytes() const { return height * width * channels; }
};

/// One value a channel; gray takes the first.
using Color = std::array<uint8_t, 3>;
/// round(255 x) of values x that stand in [0, 1], one for each of at most 3 channels; clamped.
Color color_of(const std::vector<float>& values);

/// The largest standard deviation of gaussian_blur, in pixels.
inline constexpr double kLargestBlur = 1000;

namespace pixels {

void mirror(const Pixels& p);           ///< left and right exchanged
void flip_vertically(const Pixels& p);  ///< top and bottom exchanged

// ImageOps: value by value, through a table.
/// Each channel stretched so that its darkest value becomes 0 and its lightest 255; a channel of one value stays.
void autocontrast(const Pixels& p);
/// Each channel through its cumulative histogram.
void equalize(const Pixels& p);
void invert(const Pixels& p);
/// Keeps the `bits` highest bits of each value: 8 or more change nothing, 0 or fewer leave black (as Pillow did before it refused them).
void posterize(const Pixels& p, int bits);
/// Inverts the values from `threshold` (0..256) on.
void solarize(const Pixels& p, int threshold);
/// Adds `add` >= 0 to the values below `threshold`, at most up to 255 (timm's solarize_add).
void solarize_add(const Pixels& p, int add, int threshold = 128);

// ImageEnhance: from a degenerate picture (factor 0) through the picture (factor 1) and beyond, cut to bytes.
void brightness(const Pixels& p, float factor);  ///< from black
void contrast(const Pixels& p, float factor);    ///< from the mean of the luma
void color(const Pixels& p, float factor);       ///< from the luma; gray stays as it is
void sharpness(const Pixels& p, float factor);   ///< from ImageFilter.SMOOTH (3 x 3; the outermost pixels stay)

/// torchvision's adjust_hue of a Pillow image: trunc(255 turn) is added, modulo 256, to the hue of convert("HSV"), whose three values are
/// bytes. `turn` in -0.5..0.5 is a share of a whole turn. HSV in bytes loses some colours, also where the turn is 0; gray stays.
void hue(const Pixels& p, double turn);

/// convert("L"), repeated over the channels.
void grayscale(const Pixels& p);

/// ImageFilter.GaussianBlur: three box blurs of fractional width each way (Gwosdek et al., "Theoretical Foundations of Gaussian
/// Convolution by Extended Box Filtering", SSVM 2011), each rounded to bytes; outside, the outermost pixels go on. `sigma` is the standard
/// deviation in pixels, in 0..kLargestBlur.
void gaussian_blur(const Pixels& p, double sigma);

/// Image.transform(AFFINE): the pixel at (x, y) is read at (m[0] x + m[1] y + m[2], m[3] x + m[4] y + m[5]), counted from the corner of
/// the picture at pixel centres; what lies outside becomes `fill`. The cubic here has a = -1, other than in resize.
void affine(const Pixels& p, const std::array<double, 6>& matrix, Interpolation interpolation, const Color& fill);
/// Image.rotate: counter-clockwise around the centre, at the same size.
void rotate(const Pixels& p, double degrees, Interpolation interpolation, const Color& fill);

}  // namespace pixels
}  // namespace mesa
