// JPEG through libjpeg-turbo. libjpeg reports errors by longjmp, so everything that owns memory lives outside the jumping function.
#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstring>

// jpeglib.h needs what stands above it, and jerror.h needs jpeglib.h.
// clang-format off
#include <jpeglib.h>
#include <jerror.h>
// clang-format on

#include "mesa/base/error.h"
#include "mesa/data/image.h"

namespace mesa::detail {

namespace {
/// A block of 8 x 8 samples costs at least one bit, so no honest JPEG holds more pixels a byte.
constexpr uint64_t kMaxPixelsPerByte = 512;
/// A progressive picture has about ten scans; thousands of empty ones are an attack on the reader's time.
constexpr int kMaxScans = 500;

struct JpegError {
  jpeg_error_mgr manager;  // first, so that the library's pointer is ours
  std::jmp_buf escape;
  char message[JMSG_LENGTH_MAX];
};

void on_error(j_common_ptr info) {
  auto* error = reinterpret_cast<JpegError*>(info->err);
  info->err->format_message(info, error->message);
  std::longjmp(error->escape, 1);
}

/// Warnings that mean pixels were invented end the decoding; those about harmless disorder (extra bytes, odd markers) do not.
void on_message(j_common_ptr info, int level) {
  if (level >= 0) return;  // traces
  switch (info->err->msg_code) {
    case JWRN_JPEG_EOF:
    case JWRN_HIT_MARKER:
    case JWRN_HUFF_BAD_CODE:
    case JWRN_ARITH_BAD_CODE:
    case JWRN_MUST_RESYNC:
    case JWRN_NOT_SEQUENTIAL: on_error(info); break;
    default: break;
  }
}

void on_progress(j_common_ptr info) {
  auto* decoder = reinterpret_cast<j_decompress_ptr>(info);
  if (decoder->input_scan_number <= kMaxScans) return;
  auto* error = reinterpret_cast<JpegError*>(info->err);
  std::snprintf(error->message, sizeof error->message, "more than %d scans", kMaxScans);
  std::longjmp(error->escape, 1);
}

class Decoder {
 public:
  Decoder(const uint8_t* bytes, size_t size) : bytes_(bytes), size_(size) {
    std::memset(&info_, 0, sizeof info_);
    info_.err = jpeg_std_error(&error_.manager);
    error_.manager.error_exit = on_error;
    error_.manager.emit_message = on_message;
    error_.manager.output_message = [](j_common_ptr) {};
    error_.message[0] = 0;
    progress_.progress_monitor = on_progress;
  }
  ~Decoder() { jpeg_destroy_decompress(&info_); }
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  /// False with `message()` set when the header is damaged. No local object with a destructor may live in these two functions.
  bool read_header() {
    if (setjmp(error_.escape)) return false;
    jpeg_create_decompress(&info_);
    info_.progress = &progress_;
    jpeg_mem_src(&info_, bytes_, size_);
    jpeg_save_markers(&info_, JPEG_APP0 + 1, 0xFFFF);
    jpeg_read_header(&info_, TRUE);
    if (info_.jpeg_color_space == JCS_GRAYSCALE)
      info_.out_color_space = JCS_GRAYSCALE;
    else if (info_.num_components == 4)
      info_.out_color_space = JCS_CMYK;
    else
      info_.out_color_space = JCS_RGB;
    return true;
  }

  bool read_pixels(uint8_t* pixels, size_t row_bytes) {
    if (setjmp(error_.escape)) return false;
    jpeg_start_decompress(&info_);
    while (info_.output_scanline < info_.output_height) {
      JSAMPROW row = pixels + row_bytes * info_.output_scanline;
      jpeg_read_scanlines(&info_, &row, 1);
    }
    jpeg_finish_decompress(&info_);
    return true;
  }

  /// Sets output_width, output_height and output_components for the decoding to come.
  bool plan_output(unsigned denominator) {
    if (setjmp(error_.escape)) return false;
    info_.scale_num = 1;
    info_.scale_denom = denominator;
    jpeg_calc_output_dimensions(&info_);
    return true;
  }

  const jpeg_decompress_struct& info() const { return info_; }
  const char* message() const { return error_.message; }

  int orientation() const {
    for (auto* marker = info_.marker_list; marker != nullptr; marker = marker->next)
      if (marker->marker == JPEG_APP0 + 1 && marker->data_length >= 6 && std::memcmp(marker->data, "Exif\0\0", 6) == 0)
        return exif_orientation(marker->data, marker->data_length);
    return 1;
  }

 private:
  const uint8_t* bytes_;
  size_t size_;
  jpeg_decompress_struct info_;
  jpeg_progress_mgr progress_{};
  JpegError error_;
};

unsigned scale_denominator(unsigned shorter_side, int min_side) {
  unsigned denominator = 1;
  if (min_side > 0)
    while (denominator < 8 && shorter_side / (2 * denominator) >= static_cast<unsigned>(min_side)) denominator *= 2;
  return denominator;
}

/// CMYK as Adobe stores it, inverted (0 is full ink), to RGB: r = k (255 - c) / 255 with c the ink, rounded as Pillow does.
void cmyk_to_rgb(Image& image) {
  const size_t n = static_cast<size_t>(image.height) * image.width;
  std::vector<uint8_t> rgb(3 * n);
  for (size_t i = 0; i < n; ++i) {
    const uint8_t* p = image.pixels.data() + 4 * i;
    const int light = p[3];
    for (int c = 0; c < 3; ++c) {
      const int product = (255 - p[c]) * light + 128;
      rgb[3 * i + c] = static_cast<uint8_t>(std::clamp(light - (((product >> 8) + product) >> 8), 0, 255));
    }
  }
  image.pixels = std::move(rgb);
  image.channels = 3;
}
}  // namespace

Image decode_jpeg(const uint8_t* bytes, size_t size, const std::string& name, const DecodeOptions& options) {
  Decoder decoder(bytes, size);
  const auto& info = decoder.info();
  const bool readable = decoder.read_header();
  if (!readable && info.err->msg_code == JERR_IMAGE_TOO_BIG)  // libjpeg stops at 65,500 pixels a side: our own limit says it better
    check_dimensions(info.image_width, info.image_height, size, kMaxPixelsPerByte, name, options);
  check(readable, name, ": is a damaged JPEG: ", decoder.message());
  check_dimensions(info.image_width, info.image_height, size, kMaxPixelsPerByte, name, options);
  const unsigned shorter = std::min(info.image_width, info.image_height);
  check(decoder.plan_output(scale_denominator(shorter, options.min_side)), name, ": is a damaged JPEG: ", decoder.message());
  Image image{static_cast<int>(info.output_height), static_cast<int>(info.output_width), info.output_components, {}};
  const size_t row_bytes = static_cast<size_t>(image.width) * image.channels;
  image.pixels.resize(row_bytes * image.height);
  const int orientation = decoder.orientation();  // before the end of the pixels, when libjpeg forgets the markers
  check(decoder.read_pixels(image.pixels.data(), row_bytes), name, ": is a damaged JPEG: ", decoder.message());
  if (image.channels == 4) cmyk_to_rgb(image);
  return apply_orientation(std::move(image), orientation);
}

}  // namespace mesa::detail
