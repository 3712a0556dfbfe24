// Resampling of 8-bit pictures, bit for bit as Pillow does it (antialiased, in 22-bit fixed point).
#pragma once
#include <cstdint>
#include <string>

#include "mesa/data/image.h"

namespace mesa {

enum class Interpolation : uint8_t { bilinear, bicubic };
/// "bilinear" or "bicubic"; anything else throws Error naming `key`.
Interpolation parse_interpolation(const std::string& text, const std::string& key);

/// A rectangle of whole pixels.
struct Box {
  int64_t y = 0, x = 0, height = 0, width = 0;
};

/// Resizes the part `crop` of an image to height x width and writes the part `window` of the result (window.height x window.width x
/// channels bytes) to `out`. Only what the window needs is computed, so the size of the whole result costs nothing. As in Pillow, the
/// filter (triangle; cubic with a = -1/2) is stretched by the reduction factor, each pass rounds to bytes, and nothing outside the crop is
/// read.
void resize(const Image& image, const Box& crop, int64_t height, int64_t width, const Box& window, Interpolation interpolation,
            uint8_t* out);

}  // namespace mesa
