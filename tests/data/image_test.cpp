// Decoders: right pixels from good files, a named error from every other, and never more memory than the file can justify.
#include <sys/resource.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstdlib>

#include "mesa/base/random.h"
#include "support/data_files.h"

using namespace mesa;
using namespace mesa::testing;

namespace {
Image decode(const Bytes& bytes, const DecodeOptions& options = {}) { return decode_image(bytes.data(), bytes.size(), "picture", options); }

double mean_difference(const Image& a, const Image& b) {
  REQUIRE(a.height == b.height);
  REQUIRE(a.width == b.width);
  REQUIRE(a.channels == b.channels);
  double sum = 0;
  for (size_t i = 0; i < a.pixels.size(); ++i) sum += std::abs(a.pixels[i] - b.pixels[i]);
  return sum / static_cast<double>(a.pixels.size());
}

/// An APP1 segment's payload with one directory entry.
Bytes exif(bool big_endian, int orientation, int type = 3) {
  const auto u16 = [&](int v) { return big_endian ? Bytes{uint8_t(v >> 8), uint8_t(v)} : Bytes{uint8_t(v), uint8_t(v >> 8)}; };
  Bytes out{'E', 'x', 'i', 'f', 0, 0};
  const auto add = [&](const Bytes& b) { out.insert(out.end(), b.begin(), b.end()); };
  add(big_endian ? Bytes{'M', 'M'} : Bytes{'I', 'I'});
  add(u16(42));
  add(big_endian ? Bytes{0, 0, 0, 8} : Bytes{8, 0, 0, 0});
  add(u16(1));
  add(u16(0x0112));
  add(u16(type));
  add(big_endian ? Bytes{0, 0, 0, 1} : Bytes{1, 0, 0, 0});
  add(u16(orientation));
  add({0, 0, 0, 0, 0, 0});
  return out;
}

/// A JPEG with the segment put behind its SOI marker.
Bytes with_app1(const Bytes& jpeg, const Bytes& payload) {
  const size_t length = payload.size() + 2;
  Bytes out{0xFF, 0xD8, 0xFF, 0xE1, uint8_t(length >> 8), uint8_t(length)};
  out.insert(out.end(), payload.begin(), payload.end());
  out.insert(out.end(), jpeg.begin() + 2, jpeg.end());
  return out;
}

int64_t peak_memory_kb() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss;
}
}  // namespace

TEST_CASE("a JPEG decodes to nearly what was written", "[data]") {
  for (int channels : {1, 3})
    for (bool progressive : {false, true}) {
      const Image image = test_image(37, 53, channels);
      CHECK(mean_difference(decode(encode_jpeg(image, 98, progressive)), image) < 2.5);
    }
}

TEST_CASE("a PNG decodes to exactly what was written, without its alpha", "[data]") {
  for (int channels : {1, 3}) {
    const Image image = test_image(19, 23, channels);
    CHECK(decode(encode_png(image)).pixels == image.pixels);
  }
  Image rgba = test_image(9, 7, 4), rgb = test_image(9, 7, 3);
  for (size_t i = 0; i < 63; ++i) rgba.pixels[4 * i + 3] = static_cast<uint8_t>(i);
  for (size_t i = 0; i < 63; ++i) std::copy_n(&rgba.pixels[4 * i], 3, &rgb.pixels[3 * i]);
  CHECK(decode(encode_png(rgba)).pixels == rgb.pixels);
}

TEST_CASE("Adobe's CMYK becomes RGB", "[data]") {
  Image ink{16, 16, 4, Bytes(16 * 16 * 4)};
  for (size_t i = 0; i < 256; ++i) ink.pixels[4 * i] = 255;  // pure cyan
  const Image rgb = decode(encode_adobe_cmyk_jpeg(ink));
  REQUIRE(rgb.channels == 3);
  CHECK(int{rgb.pixels[0]} <= 2);
  CHECK(int{rgb.pixels[1]} >= 253);
  CHECK(int{rgb.pixels[2]} >= 253);
}

TEST_CASE("gray and RGB convert as in Pillow", "[data]") {
  const Image gray = convert_channels({1, 3, 3, {255, 0, 0, 0, 255, 0, 10, 20, 30}}, 1);
  CHECK(gray.pixels == Bytes{76, 150, 18});
  CHECK(convert_channels(gray, 3).pixels == Bytes{76, 76, 76, 150, 150, 150, 18, 18, 18});
}

TEST_CASE("EXIF orientations are read in both byte orders and applied", "[data]") {
  for (int orientation = 1; orientation <= 8; ++orientation)
    for (bool big_endian : {false, true}) {
      const Bytes segment = exif(big_endian, orientation);
      CHECK(exif_orientation(segment.data(), segment.size()) == orientation);
    }
  const Image stored{2, 3, 1, {1, 2, 3, 4, 5, 6}};
  const std::vector<Bytes> upright{{1, 2, 3, 4, 5, 6}, {3, 2, 1, 6, 5, 4}, {6, 5, 4, 3, 2, 1}, {4, 5, 6, 1, 2, 3},
                                   {1, 4, 2, 5, 3, 6}, {4, 1, 5, 2, 6, 3}, {6, 3, 5, 2, 4, 1}, {3, 6, 2, 5, 1, 4}};
  for (int orientation = 1; orientation <= 8; ++orientation) {
    INFO("orientation " << orientation);
    const Image turned = apply_orientation(stored, orientation);
    CHECK(turned.pixels == upright[orientation - 1]);
    CHECK(turned.height == (orientation >= 5 ? 3 : 2));
  }
}

TEST_CASE("a damaged EXIF segment is ignored", "[data]") {
  const Bytes good = exif(true, 6);
  for (size_t length = 0; length < good.size() - 6; ++length) {
    const Bytes cut(good.begin(), good.begin() + static_cast<int64_t>(length));
    CHECK(exif_orientation(cut.data(), cut.size()) == 1);
  }
  for (int orientation : {0, 9, 255}) CHECK(exif_orientation(exif(false, orientation).data(), good.size()) == 1);
  CHECK(exif_orientation(exif(false, 6, 4).data(), good.size()) == 1);  // not a short
  Bytes far = good;
  std::fill(far.begin() + 10, far.begin() + 14, uint8_t{0xFF});  // the directory lies outside
  CHECK(exif_orientation(far.data(), far.size()) == 1);
  const Image image = test_image(10, 20, 3);
  CHECK(decode(with_app1(encode_jpeg(image), far)).height == 10);
  CHECK(decode(with_app1(encode_jpeg(image), good)).height == 20);
}

TEST_CASE("what is no picture is refused by name", "[data]") {
  const TemporaryFolder folder;
  CHECK_THAT(error_of([] { decode({}); }), Catch::Contains("picture: is empty"));
  CHECK_THAT(error_of([] { decode({'G', 'I', 'F', '8', '9', 'a'}); }), Catch::Contains("neither a JPEG nor a PNG"));
  CHECK_THAT(error_of([] { decode({0xFF, 0xD8, 0xFF}); }), Catch::Contains("damaged JPEG"));
  CHECK_THAT(error_of([&] { read_image((folder.path() / "none.jpg").string()); }),
             Catch::Contains("none.jpg") && Catch::Contains("No such file"));
  CHECK_THAT(error_of([&] { read_image(folder.path().string()); }), Catch::Contains("is not a file"));
}

TEST_CASE("truncated pictures are refused at every length", "[data]") {
  const Image image = test_image(40, 40, 3);
  for (const Bytes& whole : {encode_jpeg(image, 90), encode_jpeg(image, 90, true), encode_png(image)})
    for (size_t length = 0; length + 3 < whole.size(); length += 7) {
      const Bytes cut(whole.begin(), whole.begin() + static_cast<int64_t>(length));
      INFO(length << " of " << whole.size() << " bytes");
      CHECK_THAT(error_of([&] { decode(cut); }), Catch::Contains("picture"));
    }
}

TEST_CASE("claimed sizes are checked before memory is taken", "[data]") {
  Bytes jpeg = encode_jpeg(test_image(16, 16, 3)), png = encode_png(test_image(16, 16, 3));
  const int64_t before = peak_memory_kb();
  for (size_t i = 0; i + 8 < jpeg.size(); ++i)
    if (jpeg[i] == 0xFF && jpeg[i + 1] == 0xC0) std::fill_n(jpeg.begin() + static_cast<int64_t>(i) + 5, 4, uint8_t{0xFF});
  CHECK_THAT(error_of([&] { decode(jpeg); }), Catch::Contains("65535 x 65535") && Catch::Contains("max_pixels"));
  CHECK_THAT(error_of([&] { decode(jpeg, {int64_t{1} << 40, 0}); }), Catch::Contains("cannot hold"));
  CHECK_THAT(error_of([&] { decode(png, {100, 0}); }), Catch::Contains("16 x 16") && Catch::Contains("limit of 100"));
  CHECK(peak_memory_kb() - before < 100'000);
}

TEST_CASE("a large JPEG may be decoded at a fraction", "[data]") {
  const Bytes bytes = encode_jpeg(test_image(400, 600, 3));
  CHECK(decode(bytes, {DecodeOptions{}.max_pixels, 100}).height == 100);
  CHECK(decode(bytes, {DecodeOptions{}.max_pixels, 101}).height == 200);
  CHECK(decode(bytes, {DecodeOptions{}.max_pixels, 400}).height == 400);
}

TEST_CASE("random damage never does more than throw", "[data]") {
  const Image image = test_image(33, 31, 3);
  const uint64_t seed = 20240817;
  INFO("seed " << seed);
  RandomStream random(RandomKey::of(seed, "damage", 0));
  for (const Bytes& whole : {encode_jpeg(image), encode_jpeg(image, 80, true), encode_png(image)})
    for (int round = 0; round < 300; ++round) {
      Bytes bytes = whole;
      for (int i = 0; i < 3; ++i) bytes[random.below(bytes.size())] = static_cast<uint8_t>(random.next());
      try {
        decode(bytes);
      } catch (const Error&) {
      }
    }
}

TEST_CASE("hostile pictures decode or are refused by name", "[data][shared]") {
  const auto folder = shared_data("hostile");
  if (!folder) {
    WARN("skipped: the folder of hostile pictures is absent");
    return;
  }
  const int64_t before = peak_memory_kb();
  for (const auto& entry : std::filesystem::directory_iterator(*folder)) {
    const std::string path = entry.path().string(), name = entry.path().filename().string();
    INFO(name);
    const std::string error = error_of([&] {
      const Image image = read_image(path);
      CHECK(image.pixels.size() == static_cast<size_t>(image.height) * image.width * image.channels);
    });
    if (!error.empty()) CHECK_THAT(error, Catch::Contains(path));
    for (const char* good : {"hopper_gray.jpg", "pil_sample_cmyk.jpg", "truncated_app14.jpg", "truncated_exif_dpi.jpg"})
      if (name == good) CHECK(error == "");
    for (const char* bad : {"empty.jpg", "max_size.jpg", "truncated_image.png", "truncated_jpeg.jpg", "broken.png"})
      if (name == bad) CHECK(error != "");
    if (name[0] == 'x') CHECK(error != "");  // PngSuite's names for what must be refused
  }
  CHECK(peak_memory_kb() - before < 200'000);
}

TEST_CASE("one picture in every EXIF orientation decodes upright", "[data][shared]") {
  const auto folder = shared_data("exif");
  if (!folder) {
    WARN("skipped: the folder of EXIF examples is absent");
    return;
  }
  const Image first = read_image((*folder / "Landscape_0.jpg").string());
  for (int i = 1; i <= 8; ++i) {
    INFO("Landscape_" << i);
    CHECK(mean_difference(read_image((*folder / ("Landscape_" + std::to_string(i) + ".jpg")).string()), first) < 6);
  }
}
