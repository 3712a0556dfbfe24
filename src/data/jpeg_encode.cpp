// Writing JPEG through libjpeg-turbo.
#include <csetjmp>
#include <cstdlib>

// jpeglib.h needs what stands above it.
// clang-format off
#include <cstdio>
#include <jpeglib.h>
// clang-format on

#include "mesa/base/error.h"
#include "mesa/data/image.h"

namespace mesa {

namespace {
struct Escape {
  jpeg_error_mgr manager;  // first, so that the library's pointer is ours
  std::jmp_buf jump;
  char message[JMSG_LENGTH_MAX];
};

/// What the library allocates, freed whatever happens.
struct Encoder {
  jpeg_compress_struct info;
  Escape escape;
  unsigned char* data = nullptr;
  unsigned long size = 0;
  ~Encoder() {
    jpeg_destroy_compress(&info);
    std::free(data);
  }
};

void on_error(j_common_ptr info) {
  auto* escape = reinterpret_cast<Escape*>(info->err);
  info->err->format_message(info, escape->message);
  std::longjmp(escape->jump, 1);
}

/// False with the message set. No local object with a destructor may live here.
bool compress(Encoder& encoder, const Image& image, int quality) {
  jpeg_compress_struct& info = encoder.info;
  info.err = jpeg_std_error(&encoder.escape.manager);
  encoder.escape.manager.error_exit = on_error;
  if (setjmp(encoder.escape.jump)) return false;
  jpeg_create_compress(&info);
  jpeg_mem_dest(&info, &encoder.data, &encoder.size);
  info.image_width = static_cast<JDIMENSION>(image.width);
  info.image_height = static_cast<JDIMENSION>(image.height);
  info.input_components = image.channels;
  info.in_color_space = image.channels == 1 ? JCS_GRAYSCALE : JCS_RGB;
  jpeg_set_defaults(&info);
  jpeg_set_quality(&info, quality, TRUE);
  jpeg_start_compress(&info, TRUE);
  while (info.next_scanline < info.image_height) {
    JSAMPROW row = const_cast<JSAMPROW>(image.pixels.data()) + size_t{info.next_scanline} * image.width * image.channels;
    jpeg_write_scanlines(&info, &row, 1);
  }
  jpeg_finish_compress(&info);
  return true;
}
}  // namespace

std::vector<uint8_t> to_jpeg(const Image& image, int quality) {
  check(image.channels == 1 || image.channels == 3, "a JPEG has 1 or 3 channels, not ", image.channels);
  Encoder encoder{};
  check(compress(encoder, image, quality), "a picture of ", image.height, " x ", image.width,
        " pixels cannot become a JPEG: ", encoder.escape.message);
  return {encoder.data, encoder.data + encoder.size};
}

}  // namespace mesa
