// Decoded pictures, and the front end that turns the bytes of a JPEG or PNG file into one.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace mesa {

/// 8-bit pixels, rows from the top, channels interleaved: pixels[(y * width + x) * channels + c]. 1 channel is gray, 3 are RGB.
struct Image {
  int height = 0, width = 0, channels = 0;
  std::vector<uint8_t> pixels;
};

struct DecodeOptions {
  /// A file that claims more pixels is refused before memory is taken. The default is Pillow's limit for decompression bombs.
  int64_t max_pixels = 178'956'970;
  /// A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as its shorter side keeps this many pixels; 0 always decodes in full.
  int min_side = 0;
};

/// Decodes a JPEG or PNG, recognized by its first bytes, as Pillow's convert("RGB") does, except that gray stays one channel, the EXIF
/// orientation of a JPEG is applied, and damaged pixel data (truncation, bad codes, bad checksums) is refused rather than filled in.
/// Adobe's inverted CMYK and YCCK become RGB; 16-bit PNG keeps the high byte; alpha is dropped. `name` stands in the errors.
Image decode_image(const uint8_t* bytes, size_t size, const std::string& name, const DecodeOptions& options = {});

/// Picture files have at most so many bytes.
inline constexpr int64_t kMaxImageFile = int64_t{1} << 30;

/// Reads and decodes a file; errors name it.
Image read_image(const std::string& path, const DecodeOptions& options = {});

/// A JPEG file as libjpeg writes it unless told otherwise: baseline, chroma at half the resolution. `quality` in 1..100.
std::vector<uint8_t> to_jpeg(const Image& image, int quality);

/// The ITU-R 601 luma of an RGB pixel, as Pillow's convert("L") rounds it.
inline uint8_t luma(const uint8_t* rgb) {
  return static_cast<uint8_t>((rgb[0] * 19595u + rgb[1] * 38470u + rgb[2] * 7471u + 0x8000u) >> 16);
}

/// The bytes of a PNG file with these pixels (1 or 3 channels), without loss.
std::vector<uint8_t> to_png(const Image& image);

/// Gray <-> RGB: gray is repeated, RGB becomes its luma.
Image convert_channels(Image image, int channels);

/// The orientation (1..8) in the payload of an APP1 segment ("Exif\0\0" and a TIFF directory); 1 where it is absent or damaged.
int exif_orientation(const uint8_t* segment, size_t size);

/// Turns and mirrors stored pixels upright, as EXIF orientation 1..8 asks; 5..8 exchange height and width.
Image apply_orientation(Image image, int orientation);

namespace detail {
Image decode_jpeg(const uint8_t* bytes, size_t size, const std::string& name, const DecodeOptions& options);
Image decode_png(const uint8_t* bytes, size_t size, const std::string& name, const DecodeOptions& options);
/// Refuses what exceeds options.max_pixels, and what no file of `size` bytes can hold (`pixels_per_byte` bounds the format).
void check_dimensions(uint64_t width, uint64_t height, size_t size, uint64_t pixels_per_byte, const std::string& name,
                      const DecodeOptions& options);
}  // namespace detail

}  // namespace mesa
