#include "mesa/train/pictures.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <fstream>
#include <limits>

#include "mesa/data/pixels.h"
#include "support/data_files.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

Batch batch_of(int count, int side, int channels) {
  Batch batch{Tensor::empty({count, side, side, channels}, DType::u8), Tensor::empty({count}, DType::i64), {}, {}, 4, 0, {}, {}};
  const Image image = test_image(side, side, channels);
  for (int i = 0; i < count; ++i) {
    std::copy(image.pixels.begin(), image.pixels.end(), batch.images.data<uint8_t>() + i * image.pixels.size());
    batch.images.data<uint8_t>()[i * image.pixels.size()] = static_cast<uint8_t>(i);  // told apart by their first byte
    batch.labels.data<int64_t>()[i] = i % 3;
    batch.sample_indices.push_back(100 + i);
  }
  return batch;
}

}  // namespace

TEST_CASE("pictures: samples are shown as the model sees them, mirrored where it reads them so") {
  Batch batch = batch_of(2, 8, 3);
  batch.mirrored = Tensor::from<uint8_t>({2}, {0, 1});
  const PictureList list = sample_pictures(batch, {});
  for (const size_t i : {0, 1}) {
    Bytes want(batch.images.data<uint8_t>() + i * 8 * 8 * 3, batch.images.data<uint8_t>() + (i + 1) * 8 * 8 * 3);
    if (i == 1) pixels::mirror({want.data(), 8, 8, 3});
    const Bytes& png = list.pictures.at(i).png;
    CHECK(decode_image(png.data(), png.size(), "picture").pixels == want);
  }
}

TEST_CASE("pictures: PNG keeps every byte") {
  for (const int channels : {1, 3}) {
    const Image image = test_image(13, 7, channels);
    const Bytes png = to_png(image);
    const Image back = decode_image(png.data(), png.size(), "picture");
    CHECK(back.height == 13);
    CHECK(back.width == 7);
    CHECK(back.channels == channels);
    CHECK(back.pixels == image.pixels);
  }
  CHECK_THROWS_WITH(to_png(Image{1, 1, 4, Bytes(4)}), Contains("4 channels"));
  CHECK_THROWS_WITH(to_png(Image{2, 2, 3, Bytes(4)}), Contains("4 bytes"));
  CHECK_THROWS_WITH(to_png(Image{}), Contains("0 x 0"));
}

TEST_CASE("pictures: base64 as RFC 4648 has it") {
  const std::pair<const char*, const char*> vectors[] = {
      {"", ""}, {"f", "Zg=="}, {"fo", "Zm8="}, {"foo", "Zm9v"}, {"foob", "Zm9vYg=="}, {"fooba", "Zm9vYmE="}, {"foobar", "Zm9vYmFy"}};
  for (const auto& [text, coded] : vectors) {
    const Bytes bytes(text, text + std::char_traits<char>::length(text));
    CHECK(to_base64(bytes) == coded);
    CHECK(from_base64(coded) == bytes);
  }
  Bytes all;
  for (int i = 0; i < 256; ++i) all.push_back(static_cast<uint8_t>(i));
  CHECK(from_base64(to_base64(all)) == all);
  for (const char* wrong : {"Zg=", "Z", "Zg==Zg==", "Z===", "Zm9v\n", "Zm9 ", "Zm\"v", "====", "=m9v"})
    CHECK_THROWS_AS(from_base64(wrong), Error);
}

TEST_CASE("pictures: the first of a batch, reduced, with their labels") {
  const PictureList list = sample_pictures(batch_of(40, 160, 3), {"ant", "bee"});
  REQUIRE(list.pictures.size() == kMostPictures);
  CHECK(list.epoch == 5);
  CHECK_FALSE(list.predictions);
  CHECK(list.pictures[4].name == "bee");
  CHECK(list.pictures[5].name == "2");  // no name for this label
  CHECK(list.pictures[5].index == 105);
  const auto& png = list.pictures[0].png;
  CHECK(decode_image(png.data(), png.size(), "picture").height == kPictureSide);
  const PictureList small = sample_pictures(batch_of(2, 16, 1), {"ant", "bee", "cat"});
  const Image first = decode_image(small.pictures[1].png.data(), small.pictures[1].png.size(), "picture");
  CHECK(first.height == 16);
  CHECK(first.pixels[0] == 1);
}

TEST_CASE("pictures: mistakes are those whose label has not the highest logit") {
  MistakeFinder finder({"ant", "bee", "cat"});
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  // Labels 0, 1, 2, 0, 1, 2: right, wrong, a tie that the lower class wins, NaN, wrong by infinity, right.
  finder.take(batch_of(6, 16, 3), Tensor::from<float>({6, 3}, {2, 1, 0, 3, 1, 0, 1, 0, 1, nan, 0, 1, 0, 0, inf, 0, 0, 9}));
  const PictureList list = finder.finish(7, 70);
  REQUIRE(list.pictures.size() == 3);
  CHECK(list.epoch == 7);
  CHECK(list.step == 70);
  CHECK(list.predictions);
  CHECK(list.pictures[0].index == 101);
  CHECK(list.pictures[0].name == "bee");
  CHECK(list.pictures[0].predicted_name == "ant");
  CHECK(list.pictures[0].confidence == Approx(std::exp(3) / (std::exp(3) + std::exp(1) + 1)));
  CHECK(list.pictures[1].predicted == 0);
  CHECK(list.pictures[2].predicted_name == "cat");
  CHECK(list.pictures[2].confidence == 1);
  CHECK(finder.finish(8, 80).pictures.empty());
  for (int i = 0; i < 20; ++i) finder.take(batch_of(3, 16, 3), Tensor::from<float>({3, 3}, {0, 1, 0, 1, 0, 0, 1, 0, 0}));
  CHECK(finder.finish(9, 90).pictures.size() == kMostPictures);
}

TEST_CASE("pictures: a file of them is read back, and refused where it is damaged") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "mistakes.json").string();
  MistakeFinder finder({"a\xff", "<b>", "c"});
  finder.take(batch_of(3, 16, 3), Tensor::from<float>({3, 3}, {0, 1, 0, 1, 0, 0, 1, 0, 0}));
  const PictureList list = finder.finish(2, 20);
  write_pictures(path, list);
  const PictureList back = read_pictures(path);
  REQUIRE(back.pictures.size() == 3);
  CHECK(back.epoch == 2);
  CHECK(back.step == 20);
  CHECK(back.pictures[1].png == list.pictures[1].png);
  CHECK(back.pictures[0].predicted_name == "<b>");
  CHECK(back.pictures[1].confidence == list.pictures[1].confidence);
  CHECK_THROWS_WITH(read_pictures(path + "x"), Contains("mistakes.jsonx"));
  for (const char* text :
       {"", "[]", "{\"epoch\":1}", "{\"epoch\":\"1\",\"step\":1,\"predictions\":false,\"pictures\":[]}",
        "{\"epoch\":1,\"step\":1,\"predictions\":false,\"pictures\":{}}",
        "{\"epoch\":1,\"step\":1,\"predictions\":false,\"pictures\":[{\"index\":1,\"label\":1,\"name\":\"a\",\"png\":\"Zm9v\"}]}"}) {
    std::ofstream(path) << text;
    CHECK_THROWS_WITH(read_pictures(path), Contains("mistakes.json"));
  }
}
