#include "support/data_files.h"

#include <jpeglib.h>  // needs what stands above it
#include <png.h>
#include <unistd.h>
#include <zlib.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>

#include "support/paths.h"

namespace mesa::testing {

namespace fs = std::filesystem;

TemporaryFolder::TemporaryFolder() {
  std::string pattern = (fs::temp_directory_path() / "mesa-data-XXXXXX").string();
  check(::mkdtemp(pattern.data()) != nullptr, "cannot make ", pattern);
  path_ = pattern;
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

std::string TemporaryFolder::write(const std::string& name, const Bytes& bytes) const {
  const fs::path path = path_ / name;
  fs::create_directories(path.parent_path());
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  check(file.good(), "cannot write ", path.string());
  return path.string();
}

std::optional<fs::path> shared_data(const std::string& part) {
  const char* configured = std::getenv("MESA_SHARED_DATA");
  const fs::path root = configured != nullptr ? fs::path(configured) : fs::path(source_dir()) / ".." / "shared" / "data";
  if (!fs::is_directory(root / part)) return std::nullopt;
  return root / part;
}

Image test_image(int height, int width, int channels) {
  Image image{height, width, channels, Bytes(static_cast<size_t>(height) * width * channels)};
  for (int y = 0; y < height; ++y)
    for (int x = 0; x < width; ++x)
      for (int c = 0; c < channels; ++c) {
        const int value = c == 0 ? 255 * x / width : c == 1 ? 255 * y / height : 255 * (x + y) / (height + width);
        image.pixels[(static_cast<size_t>(y) * width + x) * channels + c] = static_cast<uint8_t>(value);
      }
  return image;
}

namespace {
Bytes compress(const Image& image, J_COLOR_SPACE space, int quality, bool progressive) {
  jpeg_compress_struct info;
  jpeg_error_mgr error;
  info.err = jpeg_std_error(&error);
  jpeg_create_compress(&info);
  unsigned char* data = nullptr;
  unsigned long size = 0;
  jpeg_mem_dest(&info, &data, &size);
  info.image_width = image.width;
  info.image_height = image.height;
  info.input_components = image.channels;
  info.in_color_space = space;
  jpeg_set_defaults(&info);
  jpeg_set_quality(&info, quality, TRUE);
  if (progressive) jpeg_simple_progression(&info);
  jpeg_start_compress(&info, TRUE);
  while (info.next_scanline < info.image_height) {
    JSAMPROW row = const_cast<JSAMPROW>(image.pixels.data()) + static_cast<size_t>(info.next_scanline) * image.width * image.channels;
    jpeg_write_scanlines(&info, &row, 1);
  }
  jpeg_finish_compress(&info);
  jpeg_destroy_compress(&info);
  Bytes bytes(data, data + size);
  std::free(data);
  return bytes;
}
}  // namespace

Bytes encode_jpeg(const Image& image, int quality, bool progressive) {
  return compress(image, image.channels == 1 ? JCS_GRAYSCALE : JCS_RGB, quality, progressive);
}

Bytes encode_adobe_cmyk_jpeg(const Image& ink) {
  Image inverted = ink;
  for (uint8_t& v : inverted.pixels) v = static_cast<uint8_t>(255 - v);
  return compress(inverted, JCS_CMYK, 100, false);
}

Bytes encode_png(const Image& image) {
  png_image png{};
  png.version = PNG_IMAGE_VERSION;
  png.width = image.width;
  png.height = image.height;
  png.format = image.channels == 1 ? PNG_FORMAT_GRAY : image.channels == 4 ? PNG_FORMAT_RGBA : PNG_FORMAT_RGB;
  png_alloc_size_t size = 0;
  png_image_write_to_memory(&png, nullptr, &size, 0, image.pixels.data(), 0, nullptr);
  Bytes bytes(size);
  check(png_image_write_to_memory(&png, bytes.data(), &size, 0, image.pixels.data(), 0, nullptr) != 0, "cannot write a PNG");
  bytes.resize(size);
  return bytes;
}

Bytes gzip(const Bytes& bytes) {
  z_stream stream{};
  deflateInit2(&stream, 9, Z_DEFLATED, 16 + MAX_WBITS, 8, Z_DEFAULT_STRATEGY);
  Bytes out(deflateBound(&stream, bytes.size()) + 32);
  stream.next_in = const_cast<uint8_t*>(bytes.data());
  stream.avail_in = static_cast<uInt>(bytes.size());
  stream.next_out = out.data();
  stream.avail_out = static_cast<uInt>(out.size());
  check(deflate(&stream, Z_FINISH) == Z_STREAM_END, "cannot compress");
  out.resize(stream.total_out);
  deflateEnd(&stream);
  return out;
}

Bytes idx_bytes(const std::vector<uint32_t>& dims, const Bytes& values) {
  Bytes out{0, 0, 8, static_cast<uint8_t>(dims.size())};
  for (uint32_t d : dims)
    for (int shift : {24, 16, 8, 0}) out.push_back(static_cast<uint8_t>(d >> shift));
  out.insert(out.end(), values.begin(), values.end());
  return out;
}

Bytes cifar_bytes(int records, int label_bytes, int label) {
  Bytes out;
  for (int r = 0; r < records; ++r) {
    for (int i = 0; i < label_bytes; ++i) out.push_back(static_cast<uint8_t>(label));
    for (int i = 0; i < 3072; ++i) out.push_back(static_cast<uint8_t>(r + i / 4));
  }
  return out;
}

}  // namespace mesa::testing
