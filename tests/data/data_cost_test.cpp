// What a picture costs from each format on one thread, beside libjpeg-turbo alone: mesa-tests "[data-cost]". Hidden, as it measures time.
#include <algorithm>
#include <catch2/catch.hpp>
#include <chrono>
#include <fstream>
#include <functional>

// jpeglib.h needs what stands above it.
// clang-format off
#include <cstdio>
#include <jpeglib.h>
// clang-format on

#include "mesa/data/loader.h"
#include "support/many_formats.h"

using namespace mesa;
using namespace mesa::testing;

namespace {
using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

/// As little as libjpeg-turbo asks for.
void decode_alone(std::span<const uint8_t> file, Bytes& pixels) {
  jpeg_decompress_struct info;
  jpeg_error_mgr error;
  info.err = jpeg_std_error(&error);
  jpeg_create_decompress(&info);
  jpeg_mem_src(&info, file.data(), file.size());
  jpeg_read_header(&info, TRUE);
  jpeg_start_decompress(&info);
  const size_t row_bytes = size_t{info.output_width} * static_cast<size_t>(info.output_components);
  pixels.resize(row_bytes * info.output_height);
  while (info.output_scanline < info.output_height) {
    JSAMPROW row = pixels.data() + row_bytes * info.output_scanline;
    jpeg_read_scanlines(&info, &row, 1);
  }
  jpeg_finish_decompress(&info);
  jpeg_destroy_decompress(&info);
}

/// Kilobytes that this process has in memory.
int64_t resident_kb() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.starts_with("VmRSS:")) return std::stoll(line.substr(6));
  return 0;
}

struct Format {
  const char* name;
  std::shared_ptr<const Dataset> data;
  TransformOptions transform;
  bool train;
};

double seconds_of(const Format& format, Bytes& out) {
  const auto begin = Clock::now();
  for (int64_t i = 0; i < format.data->size(); ++i) {
    const Image image = format.data->get(i).image;
    RandomStream random = augmentation_stream(1, 0, i);
    if (format.train)
      transform_for_training(image, format.transform, random, out.data());
    else
      transform_for_evaluation(image, format.transform, out.data());
  }
  return seconds_since(begin);
}
}  // namespace

TEST_CASE("the cost of pictures from each format", "[.][data-cost]") {
  const auto photos = shared_data("photos");
  REQUIRE(photos.has_value());
  const TemporaryFolder folder;
  DataOptions options;
  options.kind = "image_folder", options.path = photos->string(), options.test_size = 1, options.image_size = 224;
  const DatasetPair data = open_datasets(options);
  write_shards(folder, "shards", data, 16, false);
  const std::string pack = write_pack(folder, data, {}), small = folder.write("small.pack", pack_bytes(data, {256, false})),
                    raw = folder.write("raw.pack", pack_bytes(data, {256, true}));
  const auto opened = [&](const char* kind, const std::string& path) {
    DataOptions other = options;
    other.kind = kind, other.path = path, other.test_size = 0;
    return open_datasets(other).train;
  };
  const auto shards = opened("shards", folder.path() / "shards"), packed = opened("packed", pack);
  TransformOptions crop;
  crop.image_size = 224, crop.crop = Crop::resized, crop.flip = 0;
  TransformOptions bilinear = crop;
  bilinear.interpolation = Interpolation::bilinear;
  const std::vector<Format> formats{{"folder, random resized crop", data.train, crop, true},
                                    {"shards, random resized crop", shards, crop, true},
                                    {"packed, random resized crop", packed, crop, true},
                                    {"packed, random resized crop, bilinear", packed, bilinear, true},
                                    {"packed, evaluation", packed, crop, false},
                                    {"packed at 256, random resized crop", opened("packed", small), crop, true},
                                    {"packed raw at 256, random resized crop", opened("packed", raw), crop, true}};
  std::vector<double> least(formats.size() + 1, 1e30);
  Bytes pixels, out(224 * 224 * 3);
  for (int round = 0; round < 15; ++round) {  // in turns, so that whatever else runs falls on all alike
    const auto begin = Clock::now();
    for (int64_t i = 0; i < data.train->size(); ++i) decode_alone(packed->stored(i)->bytes(), pixels);
    least[formats.size()] = std::min(least[formats.size()], seconds_since(begin));
    for (size_t f = 0; f < formats.size(); ++f) least[f] = std::min(least[f], seconds_of(formats[f], out));
  }
  const double n = static_cast<double>(data.train->size()), alone = least[formats.size()];
  std::printf("%-42s %8.0f images/s\n", "libjpeg-turbo alone", n / alone);
  for (size_t f = 0; f < formats.size(); ++f)
    std::printf("%-42s %8.0f images/s  %5.1f %%\n", formats[f].name, n / least[f], 100 * alone / least[f]);
}

TEST_CASE("memory over ten epochs of each format", "[.][data-cost]") {
  const auto photos = shared_data("photos");
  REQUIRE(photos.has_value());
  const TemporaryFolder folder;
  DataOptions options;
  options.kind = "image_folder", options.path = photos->string(), options.test_size = 1, options.image_size = 224;
  const DatasetPair data = open_datasets(options);
  write_shards(folder, "shards", data, 16, false);
  const std::string pack = write_pack(folder, data, {});
  TransformOptions crop;
  crop.image_size = 224, crop.crop = Crop::resized;
  for (const auto& [kind, path] :
       {std::pair{"image_folder", options.path}, {"shards", (folder.path() / "shards").string()}, {"packed", pack}}) {
    DataOptions other = options;
    other.kind = kind, other.path = path, other.test_size = path == options.path ? 1 : 0;
    LoaderOptions how;
    how.batch_size = 12, how.workers = 4;
    Loader loader(open_datasets(other).train, crop, how);
    std::vector<int64_t> resident;
    for (int64_t epoch = 0; epoch < 50; ++epoch) {
      loader.start_epoch(epoch);
      while (loader.next()) {
      }
      if (epoch % 10 == 9 && epoch > 10) resident.push_back(resident_kb());
    }
    std::printf("%-14s resident after 20, 30, 40, 50 epochs: %lld, %lld, %lld, %lld kB\n", kind, static_cast<long long>(resident[0]),
                static_cast<long long>(resident[1]), static_cast<long long>(resident[2]), static_cast<long long>(resident[3]));
    CHECK(resident[3] <= resident[0] + 2048);  // by then every thread has met a large picture; losing one an epoch would be 15 MB
  }
}
