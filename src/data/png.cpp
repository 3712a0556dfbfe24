// PNG through libpng. libpng reports errors by longjmp, so everything that owns memory lives outside the jumping functions.
#include <png.h>

#include <cstring>

#include "mesa/base/error.h"
#include "mesa/data/image.h"

namespace mesa::detail {

namespace {
/// Deflate shrinks at most 1032 times, and a byte holds at most 8 pixels.
constexpr uint64_t kMaxPixelsPerByte = 8 * 1032;
constexpr png_alloc_size_t kMaxChunk = 8 << 20;  // for text and profiles, which are skipped anyway

struct PngSource {
  const uint8_t* bytes;
  size_t left;
  char message[128];
};

void on_error(png_structp png, png_const_charp text) {
  auto* source = static_cast<PngSource*>(png_get_error_ptr(png));
  std::strncpy(source->message, text, sizeof source->message - 1);
  png_longjmp(png, 1);
}

void on_warning(png_structp, png_const_charp) {}

void on_read(png_structp png, png_bytep to, size_t count) {
  auto* source = static_cast<PngSource*>(png_get_io_ptr(png));
  if (count > source->left) png_error(png, "the file ends too early");
  std::memcpy(to, source->bytes, count);
  source->bytes += count;
  source->left -= count;
}

class Decoder {
 public:
  Decoder(const uint8_t* bytes, size_t size) : source_{bytes, size, {}} {
    png_ = png_create_read_struct(PNG_LIBPNG_VER_STRING, &source_, on_error, on_warning);
    if (png_ != nullptr) info_ = png_create_info_struct(png_);
    check(info_ != nullptr, "out of memory for a PNG reader");
  }
  ~Decoder() { png_destroy_read_struct(&png_, &info_, nullptr); }
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  /// False with `message()` set when the file is damaged. No local object with a destructor may live in these two functions.
  bool read_header() {
    if (setjmp(png_jmpbuf(png_))) return false;
    png_set_read_fn(png_, &source_, on_read);
    png_set_user_limits(png_, 0x7fffffff, 0x7fffffff);  // our own limit is on the product and has a better message
    png_set_chunk_malloc_max(png_, kMaxChunk);
    png_set_keep_unknown_chunks(png_, PNG_HANDLE_CHUNK_NEVER, nullptr, 0);
    png_set_keep_unknown_chunks(png_, PNG_HANDLE_CHUNK_NEVER, kIgnored, static_cast<int>(sizeof kIgnored / 5));
    png_read_info(png_, info_);
    return true;
  }

  /// Asks for 8-bit gray or RGB without alpha; then channels() and row_bytes() tell what rows will be.
  bool plan_output() {
    if (setjmp(png_jmpbuf(png_))) return false;
    const int type = png_get_color_type(png_, info_);
    if (type == PNG_COLOR_TYPE_PALETTE) png_set_palette_to_rgb(png_);
    if (type == PNG_COLOR_TYPE_GRAY) png_set_expand_gray_1_2_4_to_8(png_);
    png_set_strip_16(png_);
    png_set_strip_alpha(png_);
    passes_ = png_set_interlace_handling(png_);
    png_read_update_info(png_, info_);
    return true;
  }

  bool read_pixels(uint8_t* pixels) {
    if (setjmp(png_jmpbuf(png_))) return false;
    for (int pass = 0; pass < passes_; ++pass)
      for (png_uint_32 y = 0; y < height(); ++y) png_read_row(png_, pixels + row_bytes() * y, nullptr);
    png_read_end(png_, nullptr);
    return true;
  }

  png_uint_32 width() const { return png_get_image_width(png_, info_); }
  png_uint_32 height() const { return png_get_image_height(png_, info_); }
  int channels() const { return png_get_channels(png_, info_); }
  size_t row_bytes() const { return png_get_rowbytes(png_, info_); }
  const char* message() const { return source_.message; }

 private:
  static constexpr png_byte kIgnored[] = "tEXt\0zTXt\0iTXt\0iCCP\0eXIf\0sPLT\0tIME\0pHYs\0hIST";
  PngSource source_;
  png_structp png_ = nullptr;
  png_infop info_ = nullptr;
  int passes_ = 1;
};
}  // namespace

Image decode_png(const uint8_t* bytes, size_t size, const std::string& name, const DecodeOptions& options) {
  Decoder decoder(bytes, size);
  check(decoder.read_header(), name, ": is a damaged PNG: ", decoder.message());
  check_dimensions(decoder.width(), decoder.height(), size, kMaxPixelsPerByte, name, options);
  check(decoder.plan_output(), name, ": is a damaged PNG: ", decoder.message());
  Image image{static_cast<int>(decoder.height()), static_cast<int>(decoder.width()), decoder.channels(), {}};
  check(image.channels == 1 || image.channels == 3, name, ": decodes to ", image.channels, " channels");
  check(decoder.row_bytes() == static_cast<size_t>(image.width) * image.channels, name, ": decodes to rows of ", decoder.row_bytes(),
        " bytes");
  image.pixels.resize(decoder.row_bytes() * image.height);
  check(decoder.read_pixels(image.pixels.data()), name, ": is a damaged PNG: ", decoder.message());
  return image;
}

}  // namespace mesa::detail
