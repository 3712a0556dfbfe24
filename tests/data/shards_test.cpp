// Tar shards as a data set: the same pictures, labels and order as the folder they came from, through the loader too.
#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>

#include "mesa/data/loader.h"
#include "support/many_formats.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Contains;

namespace {
std::string open_error(const DataOptions& options) {
  return error_of([&] { open_datasets(options); });
}
DataOptions shards_at(const std::string& path) {
  DataOptions options;
  options.kind = "shards", options.path = path;
  return options;
}
const NamedFiles kTwo{{"a.png", encode_png(test_image(4, 5, 3))},
                      {"a.cls", text_bytes("0")},
                      {"b.png", encode_png(test_image(6, 4, 1))},
                      {"b.cls", text_bytes("3")}};
}  // namespace

TEST_CASE("shards: the same pictures, labels and order as the folder", "[data][shards]") {
  const TemporaryFolder folder;
  const DataOptions from = write_photo_folder(folder, 7, 3);
  const DatasetPair photos = open_datasets(from);
  for (const bool beside : {false, true}) {
    const std::string name = beside ? "beside" : "apart";
    write_shards(folder, name, photos, 4, beside);
    const DatasetPair shards = open_datasets(shards_at((folder.path() / name).string()));
    CHECK(shards.train->class_names() == photos.train->class_names());
    check_same_samples(*shards.train, *photos.train);
    check_same_samples(*shards.test, *photos.test);
  }
  for (DataOptions options : {from, shards_at((folder.path() / "apart").string())}) {  // parts by seed
    options.train_size = 5, options.test_size = 2, options.seed = 3;
    const DatasetPair part = open_datasets(options);
    CHECK(part.train->size() == 5);
    CHECK(part.train->get(0).image.pixels != photos.train->get(0).image.pixels);
  }
}

TEST_CASE("shards: names of classes, or numbers up to the largest label", "[data][shards]") {
  const TemporaryFolder folder;
  const std::string path = folder.path().string();
  folder.write("imagenet-train-0000.tar", tar_bytes(kTwo));
  folder.write("imagenet-validation-0000.tar", tar_bytes({kTwo[0], kTwo[1]}));
  DataOptions options = shards_at(path);
  CHECK(open_datasets(options).train->class_names() == std::vector<std::string>{"0", "1", "2", "3"});
  CHECK(open_datasets(options).test->classes() == 4);
  options.classes = 10;
  CHECK(open_datasets(options).train->classes() == 10);
  options.classes = 3;
  CHECK_THAT(open_error(options), Contains("imagenet-train-0000.tar: b.png has label 3") && Contains("model.classes"));
  folder.write("classes.txt", text_bytes("one\ntwo\r\n\nthree\nfour\nfive\n"));
  CHECK(open_datasets(options).train->class_names() == std::vector<std::string>{"one", "two", "three", "four", "five"});
  folder.write("classes.txt", text_bytes("one\ntwo\nthree\n"));
  CHECK_THAT(open_error(options), Contains("labels go from 0 to 2 (classes.txt"));
  folder.write("classes.txt", text_bytes("caf\xe9\n"));
  CHECK_THAT(open_error(options), Contains("classes.txt") && Contains("is not UTF-8"));
  folder.write("classes.txt", {});
  CHECK_THAT(open_error(options), Contains("holds no class names"));
}

TEST_CASE("shards: what is missing, compressed or damaged is told at opening", "[data][shards]") {
  const TemporaryFolder folder;
  const std::string path = folder.path().string();
  CHECK_THAT(open_error(shards_at(path + "/none")), Contains("is not a folder"));
  CHECK_THAT(open_error(shards_at(path)), Contains("no training shards") && Contains("train-0000.tar"));
  folder.write("train/0.tar.gz", gzip(tar_bytes(kTwo)));
  CHECK_THAT(open_error(shards_at(path)), Contains("0.tar.gz: is compressed"));
  std::filesystem::remove(folder.path() / "train/0.tar.gz");
  folder.write("train/0.tar", tar_bytes(kTwo));
  CHECK_THAT(open_error(shards_at(path)), Contains("no test shards"));
  folder.write("test/0.tar", tar_bytes(kTwo));
  CHECK(open_error(shards_at(path)) == "");
  for (int i = 1; i < 40; ++i) folder.write(concat("train/", i + 100, ".tar"), i == 17 || i == 30 ? Bytes(600, 'x') : tar_bytes(kTwo));
  CHECK_THAT(open_error(shards_at(path)), Contains("train/117.tar: is damaged or not a tar archive"));  // the first one, whoever found it
  DataOptions evaluation = shards_at(path);
  evaluation.train = false;
  CHECK(open_datasets(evaluation).test->size() == 2);
  evaluation.test_size = 3;
  CHECK_THAT(open_error(evaluation), Contains("data.test_size asks for 3"));
}

TEST_CASE("shards: a picture that is damaged or was cut off later is named", "[data][shards]") {
  const TemporaryFolder folder;
  const std::string train = folder.write(
      "train/0.tar", tar_bytes({{"a.jpg", Bytes(3000, 1)}, {"a.cls", text_bytes("0")}, {"b.jpg", {}}, {"b.cls", text_bytes("0")}}));
  folder.write("val/0.tar", tar_bytes(kTwo));
  const auto data = open_datasets(shards_at(folder.path().string())).train;
  CHECK_THAT(error_of([&] { data->get(0); }), Contains("train/0.tar: a.jpg: is neither a JPEG nor a PNG"));
  CHECK_THAT(error_of([&] { data->get(1); }), Contains("train/0.tar: b.jpg: is empty"));
  CHECK_THAT(error_of([&] { data->get(2); }), Contains("sample 2"));
  std::filesystem::resize_file(train, 1000);
  CHECK_THAT(error_of([&] { data->get(0); }), Contains("train/0.tar") && Contains("became shorter"));
}

TEST_CASE("shards: more of them than a process may usually open", "[data][shards]") {
  const TemporaryFolder folder;
  const Bytes tar = tar_bytes({kTwo[0], kTwo[1]});
  for (int i = 0; i < 1100; ++i) folder.write(concat("train/", 1000 + i, ".tar"), tar);
  folder.write("val/0.tar", tar);
  const auto data = open_datasets(shards_at(folder.path().string())).train;
  CHECK(data->size() == 1100);
  CHECK(data->get(1099).image.width == 5);
}

TEST_CASE("formats: the loader gives the same batches from folder, shards and packed file, whatever its threads, also from mid-epoch",
          "[data][shards][packed]") {
  const TemporaryFolder folder;
  const DataOptions photos = write_photo_folder(folder, 13, 3);
  write_shards(folder, "shards", open_datasets(photos), 5, false);
  const std::string pack = write_pack(folder, open_datasets(photos), {});
  TransformOptions transform;
  transform.image_size = 16;
  transform.crop = Crop::resized;
  const auto batches = [&](const char* kind, const std::string& path, int64_t workers, int64_t first) {
    DataOptions options;
    options.kind = kind, options.path = path, options.image_size = 16;
    LoaderOptions how;
    how.batch_size = 3, how.workers = workers, how.seed = 5;
    Loader loader(open_datasets(options).train, transform, how);
    std::vector<Bytes> pixels;
    loader.start_epoch(1, first);
    while (auto batch = loader.next()) pixels.push_back(batch->images.to_vector<uint8_t>());
    return pixels;
  };
  const auto expected = batches("image_folder", photos.path, 1, 0);
  REQUIRE(expected.size() == 4);
  for (const auto& [kind, path] :
       {std::pair{"shards", (folder.path() / "shards").string()}, {"packed", pack}, {"image_folder", photos.path}})
    for (int64_t workers : {1, 4}) {
      CHECK(batches(kind, path, workers, 0) == expected);
      CHECK(batches(kind, path, workers, 2) == std::vector<Bytes>(expected.begin() + 2, expected.end()));
    }
}
