// Pictures as PNG, through libpng's simplified interface, which reports errors by its return value.
#include <png.h>

#include "mesa/base/error.h"
#include "mesa/data/image.h"

namespace mesa {

std::vector<uint8_t> to_png(const Image& image) {
  check(image.height > 0 && image.width > 0 && (image.channels == 1 || image.channels == 3), "a picture of ", image.height, " x ",
        image.width, " with ", image.channels, " channels cannot become a PNG");
  check(image.pixels.size() == static_cast<size_t>(image.height) * image.width * image.channels, "a picture has ", image.pixels.size(),
        " bytes of pixels, not those of its size");
  png_image head{};
  head.version = PNG_IMAGE_VERSION;
  head.width = static_cast<png_uint_32>(image.width);
  head.height = static_cast<png_uint_32>(image.height);
  head.format = image.channels == 1 ? PNG_FORMAT_GRAY : PNG_FORMAT_RGB;
  std::vector<uint8_t> out(PNG_IMAGE_PNG_SIZE_MAX(head));
  png_alloc_size_t size = out.size();
  const bool written = png_image_write_to_memory(&head, out.data(), &size, 0, image.pixels.data(), 0, nullptr) != 0;
  check(written, "a PNG cannot be written: ", head.message);
  out.resize(size);
  return out;
}

}  // namespace mesa
