// The packed file: what goes in comes out, and no byte of it can be wrong without a word.
#include "mesa/data/packed.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <functional>

#include "mesa/data/resize.h"
#include "support/many_formats.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Contains;

namespace {
DataOptions packed_at(const std::string& path) {
  DataOptions options;
  options.kind = "packed", options.path = path;
  return options;
}
std::string table_error(const Bytes& bytes) {
  return error_of([&] { PackedTable(bytes, "file"); });
}

/// A pack of two pixel records with a change to its records or its end, and right checksums again.
Bytes hostile(const std::function<void(std::vector<PackedRecord>&)>& change, const std::function<void(std::string&)>& change_text = {}) {
  std::vector<PackedRecord> records{{8, 12, 0, 0, 2, 2, 3}, {20, 4, 0, 1, 2, 2, 1}};
  change(records);
  std::string text = std::string(kPackedMagic) + std::string(16, 'p') + packed_table({"a", "b"}, records, 1, 24);
  if (change_text) change_text(text);
  return text_bytes(text);
}
}  // namespace

TEST_CASE("packed: pictures that need no change are the folder's, byte for byte", "[data][packed]") {
  const TemporaryFolder folder;
  const DatasetPair photos = open_datasets(write_photo_folder(folder, 9, 4));
  const DatasetPair packed = open_datasets(packed_at(write_pack(folder, photos, {})));
  CHECK(packed.train->class_names() == photos.train->class_names());
  check_same_samples(*packed.train, *photos.train);
  check_same_samples(*packed.test, *photos.test);
  CHECK_THAT(packed.test->describe(0), Contains("data.pack: record 9"));
  const DatasetPair raw = open_datasets(packed_at(write_pack(folder, photos, {0, true})));
  check_same_samples(*raw.train, *photos.train);
  CHECK_FALSE(raw.train->stored(0)->is_file());
  DataOptions part = packed_at(folder.path() / "data.pack");
  part.train_size = 3, part.seed = 4;
  CHECK(open_datasets(part).train->size() == 3);
  part.train_size = 10;
  CHECK_THAT(error_of([&] { open_datasets(part); }), Contains("data.train_size asks for 10"));
}

TEST_CASE("packed: larger pictures are reduced to the shorter side, others stay", "[data][packed]") {
  const TemporaryFolder folder;
  folder.write("train/a/1.jpg", encode_jpeg(test_image(90, 60, 3)));
  folder.write("train/a/2.jpg", encode_jpeg(test_image(60, 91, 1)));
  folder.write("train/a/3.png", encode_png(test_image(20, 30, 3)));
  folder.write("val/a/1.png", encode_png(test_image(90, 60, 3)));
  DataOptions options = packed_at(folder.path());
  options.kind = "image_folder";
  const DatasetPair photos = open_datasets(options);
  for (const bool raw : {false, true}) {
    const DatasetPair packed = open_datasets(packed_at(write_pack(folder, photos, {20, raw})));
    const auto size = [&](int64_t i) {
      const Image image = packed.train->get(i).image;
      return std::array{image.height, image.width, image.channels};
    };
    CHECK(size(0) == std::array{30, 20, 3});
    CHECK(size(1) == std::array{20, 30, 1});
    CHECK(size(2) == std::array{20, 30, 3});
    CHECK(packed.train->stored(0)->is_file() == !raw);
    CHECK(packed.train->get(2).image.pixels == photos.train->get(2).image.pixels);
    Image expected{30, 20, 3, Bytes(30 * 20 * 3)};
    resize(photos.test->get(0).image, {0, 0, 90, 60}, 30, 20, {0, 0, 30, 20}, Interpolation::bicubic, expected.pixels.data());
    const Image found = packed.test->get(0).image;
    int64_t off = 0;
    for (size_t i = 0; i < expected.pixels.size(); ++i) off += std::abs(found.pixels[i] - expected.pixels[i]);
    CHECK(off <= (raw ? 0 : 4 * static_cast<int64_t>(expected.pixels.size())));  // JPEG of quality 95
  }
}

TEST_CASE("packed: what is no picture file becomes pixels, also packed again", "[data][packed]") {
  const TemporaryFolder folder;
  DataOptions options;
  options.train_size = 5, options.test_size = 3;
  const DatasetPair shapes = open_datasets(options);
  const DatasetPair packed = open_datasets(packed_at(write_pack(folder, shapes, {})));
  check_same_samples(*packed.train, *shapes.train);
  CHECK_FALSE(packed.train->stored(0)->is_file());
  check_same_samples(*open_datasets(packed_at(folder.write("again.pack", pack_bytes(packed, {})))).test, *shapes.test);
}

TEST_CASE("packed: every flipped bit and every cut is found, in a record when it is read", "[data][packed]") {
  const TemporaryFolder folder;
  DataOptions options;
  options.kind = "shapes", options.train_size = 2, options.test_size = 1;
  const Bytes whole = pack_bytes(open_datasets(options), {});
  REQUIRE(table_error(whole) == "");
  const size_t records_end = 8 + 3 * 3072;
  for (size_t bit = 0; bit < whole.size() * 8; bit += bit / 8 >= 8 && bit / 8 < records_end - 2 ? 997 : 1) {
    Bytes damaged = whole;
    damaged[bit / 8] = static_cast<uint8_t>(damaged[bit / 8] ^ 1 << bit % 8);
    const std::string error = error_of([&] {
      const PackedTable table(damaged, "file");
      for (int64_t i = 0; i < 3; ++i) table.picture(i);
    });
    if (!Catch::Matchers::Contains("file").match(error)) FAIL("bit " << bit << ": " << error);
  }
  for (size_t length = 0; length < whole.size(); length += length < 8 || length > records_end ? 1 : 101)
    CHECK_THAT(table_error(Bytes(whole.begin(), whole.begin() + static_cast<int64_t>(length))), Contains("file: is "));
}

TEST_CASE("packed: lies with right checksums are refused", "[data][packed]") {
  using Records = std::vector<PackedRecord>;
  const auto record_error = [](const std::function<void(PackedRecord&)>& change) {
    return table_error(hostile([&](Records& records) { change(records[1]); }));
  };
  CHECK(record_error([](auto&) {}) == "");
  CHECK(record_error([](auto& r) { r.height = r.width = r.channels = 0; }) == "");
  CHECK_THAT(record_error([](auto& r) { r.bytes = 5; }), Contains("record 1 claims bytes 20"));
  CHECK_THAT(record_error([](auto& r) { r.bytes = 0; }), Contains("record 1"));
  CHECK_THAT(record_error([](auto& r) { r.bytes = 0xFFFFFFFF; }), Contains("record 1"));
  CHECK_THAT(record_error([](auto& r) { r.offset = 7; }), Contains("record 1"));
  CHECK_THAT(record_error([](auto& r) { r.offset = ~uint64_t{0}; }), Contains("record 1"));
  CHECK_THAT(record_error([](auto& r) { r.offset = ~uint64_t{0} - 2; }), Contains("record 1"));
  CHECK_THAT(record_error([](auto& r) { r.label = 2; }), Contains("label 2 of 2 classes"));
  CHECK_THAT(record_error([](auto& r) { r.channels = 2; }), Contains("2 x 2 x 2"));
  CHECK_THAT(record_error([](auto& r) { r.channels = 0; }), Contains("2 x 2 x 0"));
  CHECK_THAT(record_error([](auto& r) { r.height = 0; }), Contains("0 x 2 x 1"));
  CHECK_THAT(record_error([](auto& r) { r.height = r.width = 1 << 31, r.channels = 1; }), Contains("record 1"));
  const auto end_error = [](const std::function<void(PackedEnd&)>& change) {
    Bytes bytes = hostile([](Records&) {});
    PackedEnd end;
    std::memcpy(&end, bytes.data() + bytes.size() - sizeof end, sizeof end);
    change(end);
    end.crc32 = 0;
    end.crc32 = static_cast<uint32_t>(testing::crc32_of(&end, sizeof end));
    std::memcpy(bytes.data() + bytes.size() - sizeof end, &end, sizeof end);
    return table_error(bytes);
  };
  CHECK(end_error([](auto&) {}) == "");
  CHECK_THAT(end_error([](auto& e) { e.version = 2; }), Contains("has version 2"));
  CHECK_THAT(end_error([](auto& e) { e.file_bytes += 1; }), Contains("in place of"));
  CHECK_THAT(end_error([](auto& e) { e.train = ~uint64_t{0}; }), Contains("does not fit"));
  CHECK_THAT(end_error([](auto& e) { e.train = uint64_t{1} << 59, e.test = 2; }), Contains("does not fit"));
  CHECK_THAT(end_error([](auto& e) { e.table_offset = 0; }), Contains("does not fit"));
  CHECK_THAT(end_error([](auto& e) { e.table_offset = ~uint64_t{0}; }), Contains("does not fit"));
  CHECK_THAT(end_error([](auto& e) { e.names_bytes = ~uint64_t{0}; }), Contains("does not fit"));
  CHECK_THAT(end_error([](auto& e) { e.classes = 3; }), Contains("class name 2 is cut off"));
  CHECK_THAT(end_error([](auto& e) { e.classes = 1; }), Contains("after the class names"));
  CHECK_THAT(end_error([](auto& e) { e.classes = 0xFFFFFFFF; }), Contains("classes"));
}

TEST_CASE("packed: a file of another kind, halves that are empty, and a file cut while it is open", "[data][packed]") {
  const TemporaryFolder folder;
  const auto open_error = [](const std::string& path) { return error_of([&] { open_datasets(packed_at(path)); }); };
  CHECK_THAT(open_error(folder.path()), Contains("is a folder"));
  CHECK_THAT(open_error(folder.path() / "none"), Contains("none: cannot be opened"));
  CHECK_THAT(open_error(folder.write("empty", {})), Contains("empty: is empty"));
  CHECK_THAT(open_error(folder.write("png", encode_png(test_image(9, 9, 3)))), Contains("is not a packed data set"));
  const auto half = [&](int64_t train) {
    return folder.write("half", text_bytes(std::string(kPackedMagic) + "pppp" +
                                           packed_table({"a"}, std::vector<PackedRecord>{{8, 4, 0, 0, 2, 2, 1}}, train, 12)));
  };
  CHECK_THAT(open_error(half(0)), Contains("holds no pictures for training"));
  CHECK_THAT(open_error(half(1)), Contains("holds no test pictures"));
  DataOptions options;
  options.kind = "shapes", options.train_size = 40, options.test_size = 1;
  const std::string path = write_pack(folder, open_datasets(options), {});
  const auto data = open_datasets(packed_at(path)).train;
  CHECK(error_of([&] { data->get(39); }) == "");
  std::filesystem::resize_file(path, 20000);
  CHECK(error_of([&] { data->get(0); }) == "");
  CHECK_THAT(error_of([&] { data->get(39); }), Contains("data.pack") && Contains("was cut"));
}
