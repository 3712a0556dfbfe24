#include "mesa/data/image.h"

#include <cstring>

#include "mesa/base/error.h"
#include "mesa/base/files.h"

namespace mesa {

namespace {
/// (dy, dx) of a step in the upright picture, seen in the stored one, and the corner where it starts.
struct Walk {
  int64_t start, step_x, step_y;  // in pixels of the stored picture
};

Walk walk_of(int orientation, int64_t height, int64_t width) {
  const int64_t last_row = (height - 1) * width, last_column = width - 1;
  switch (orientation) {
    case 2: return {last_column, -1, width};
    case 3: return {last_row + last_column, -1, -width};
    case 4: return {last_row, 1, -width};
    case 5: return {0, width, 1};
    case 6: return {last_row, -width, 1};
    case 7: return {last_row + last_column, -width, -1};
    case 8: return {last_column, width, -1};
    default: return {0, 1, width};
  }
}
}  // namespace

void detail::check_dimensions(uint64_t width, uint64_t height, size_t size, uint64_t pixels_per_byte, const std::string& name,
                              const DecodeOptions& options) {
  check(width > 0 && height > 0, name, ": claims to be ", width, " x ", height, " pixels");
  const uint64_t pixels = width * height;  // both fit 32 bits
  check(pixels <= static_cast<uint64_t>(options.max_pixels), name, ": claims ", width, " x ", height, " pixels, more than the limit of ",
        options.max_pixels, " (data.max_pixels)");
  check(pixels / pixels_per_byte <= size, name, ": is damaged: claims ", width, " x ", height, " pixels, which ", size,
        " bytes cannot hold");
}

Image decode_image(const uint8_t* bytes, size_t size, const std::string& name, const DecodeOptions& options) {
  static constexpr uint8_t kJpeg[] = {0xFF, 0xD8, 0xFF};
  static constexpr uint8_t kPng[] = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1A, '\n'};
  check(size > 0, name, ": is empty");
  if (size >= sizeof kJpeg && std::memcmp(bytes, kJpeg, sizeof kJpeg) == 0) return detail::decode_jpeg(bytes, size, name, options);
  if (size >= sizeof kPng && std::memcmp(bytes, kPng, sizeof kPng) == 0) return detail::decode_png(bytes, size, name, options);
  fail("", name, ": is neither a JPEG nor a PNG picture (", size, " bytes, wrong signature)");
}

Image read_image(const std::string& path, const DecodeOptions& options) {
  const std::vector<uint8_t> bytes = read_bytes(path, kMaxImageFile);
  return decode_image(bytes.data(), bytes.size(), path, options);
}

Image convert_channels(Image image, int channels) {
  check(channels == 1 || channels == 3, "pictures have 1 or 3 channels, not ", channels);
  if (image.channels == channels) return image;
  const size_t n = static_cast<size_t>(image.height) * image.width;
  Image out{image.height, image.width, channels, std::vector<uint8_t>(n * channels)};
  const uint8_t* from = image.pixels.data();
  uint8_t* to = out.pixels.data();
  if (channels == 3) {
    for (size_t i = 0; i < n; ++i) to[3 * i] = to[3 * i + 1] = to[3 * i + 2] = from[i];
  } else {
    for (size_t i = 0; i < n; ++i) to[i] = luma(from + 3 * i);
  }
  return out;
}

Image apply_orientation(Image image, int orientation) {
  if (orientation <= 1 || orientation > 8) return image;
  Image out =
      orientation >= 5 ? Image{image.width, image.height, image.channels, {}} : Image{image.height, image.width, image.channels, {}};
  out.pixels.resize(image.pixels.size());
  const Walk walk = walk_of(orientation, image.height, image.width);
  uint8_t* to = out.pixels.data();
  for (int64_t y = 0; y < out.height; ++y)
    for (int64_t x = 0; x < out.width; ++x, to += image.channels)
      std::memcpy(to, image.pixels.data() + (walk.start + y * walk.step_y + x * walk.step_x) * image.channels, image.channels);
  return out;
}

namespace {
/// Bounds-checked reads from a TIFF block in its own byte order.
struct TiffReader {
  const uint8_t* data;
  size_t size;
  bool big_endian;
  bool u16(size_t at, uint32_t& value) const {
    if (size < 2 || at > size - 2) return false;
    value = big_endian ? data[at] << 8 | data[at + 1] : data[at + 1] << 8 | data[at];
    return true;
  }
  bool u32(size_t at, uint32_t& value) const {
    uint32_t first = 0, second = 0;
    if (!u16(at, first) || !u16(at + 2, second)) return false;
    value = big_endian ? first << 16 | second : second << 16 | first;
    return true;
  }
};
}  // namespace

int exif_orientation(const uint8_t* segment, size_t size) {
  constexpr uint32_t kOrientationTag = 0x0112, kShort = 3;
  if (size < 14 || std::memcmp(segment, "Exif\0\0", 6) != 0) return 1;
  TiffReader tiff{segment + 6, size - 6, segment[6] == 'M'};
  uint32_t magic = 0, directory = 0, entries = 0;
  const bool order_known = std::memcmp(tiff.data, "MM", 2) == 0 || std::memcmp(tiff.data, "II", 2) == 0;
  if (!order_known || !tiff.u16(2, magic) || magic != 42) return 1;
  if (!tiff.u32(4, directory) || !tiff.u16(directory, entries)) return 1;
  for (size_t i = 0; i < entries; ++i) {
    const size_t entry = size_t{directory} + 2 + 12 * i;
    uint32_t tag = 0, type = 0, value = 0;
    if (!tiff.u16(entry, tag) || !tiff.u16(entry + 2, type) || !tiff.u16(entry + 8, value)) return 1;
    if (tag == kOrientationTag) return type == kShort && value >= 1 && value <= 8 ? static_cast<int>(value) : 1;
  }
  return 1;
}

}  // namespace mesa
