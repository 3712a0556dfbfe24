// Resampling against Pillow's numbers, and the properties of crops, flips and colours.
#include "mesa/data/transform.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <functional>
#include <map>
#include <set>

#include "mesa/data/pixels.h"
#include "mesa/train/safetensors.h"
#include "support/data_files.h"
#include "support/paths.h"

using namespace mesa;
using namespace mesa::testing;

namespace {
/// 7 x 5 gray, value 37 i mod 256.
Image ramp() {
  Image image{7, 5, 1, Bytes(35)};
  for (int i = 0; i < 35; ++i) image.pixels[i] = static_cast<uint8_t>(37 * i % 256);
  return image;
}

Bytes resized(const Image& image, int64_t height, int64_t width, Interpolation how) {
  Bytes out(height * width * image.channels);
  resize(image, {0, 0, image.height, image.width}, height, width, {0, 0, height, width}, how, out.data());
  return out;
}

Bytes train(const Image& image, const TransformOptions& options, int64_t index) {
  Bytes out(options.bytes());
  RandomStream random = augmentation_stream(7, 3, index);
  transform_for_training(image, options, random, out.data());
  return out;
}

Bytes evaluate(const Image& image, const TransformOptions& options) {
  Bytes out(options.bytes());
  transform_for_evaluation(image, options, out.data());
  return out;
}

TransformOptions plain(int64_t size, int64_t channels) {
  TransformOptions options;
  options.image_size = size;
  options.channels = channels;
  options.flip = 0;
  options.mean.assign(channels, 0.5f);
  options.std = options.mean;
  return options;
}
}  // namespace

TEST_CASE("halving by the triangle filter is the hand-computed mean", "[data]") {
  // Reduction by 2 stretches the triangle to support 2: weights 1, 3, 3, 1 over 8 inside, 3, 3, 1 over 7 at the ends.
  const Image row{1, 4, 1, {0, 80, 160, 240}};
  const Bytes half = resized(row, 1, 2, Interpolation::bilinear);
  CHECK(int{half[0]} == (3 * 0 + 3 * 80 + 1 * 160 + 3) / 7);
  CHECK(int{half[1]} == (1 * 80 + 3 * 160 + 3 * 240 + 3) / 7);
}

TEST_CASE("resize gives Pillow's bytes", "[data]") {  // Image.resize of Pillow 13
  CHECK(resized(ramp(), 4, 3, Interpolation::bilinear) == Bytes{101, 73, 100, 124, 143, 113, 121, 91, 110, 134, 161, 133});
  CHECK(resized(ramp(), 4, 3, Interpolation::bicubic) == Bytes{103, 68, 96, 124, 151, 115, 119, 83, 110, 138, 166, 131});
  CHECK(resized(ramp(), 8, 9, Interpolation::bilinear) ==
        Bytes{0,   12,  33, 53, 74, 95,  115, 136, 148, 150, 162, 183, 112, 16, 37, 57, 78, 90,  136, 148, 169, 154, 130, 151,
              152, 75,  28, 74, 86, 107, 127, 148, 169, 177, 135, 110, 124, 99, 57, 65, 86, 107, 127, 148, 160, 206, 159, 82,
              83,  104, 80, 65, 86, 98,  144, 156, 177, 197, 218, 123, 51,  72, 84, 86, 98, 119, 139, 160, 181, 201, 222, 234});
  CHECK(resized(ramp(), 8, 9, Interpolation::bicubic) ==
        Bytes{0,   3,  27, 51, 76, 97,  117, 141, 153, 159, 178, 204, 114, 3,  10, 45, 79, 96,  142, 157, 181, 164, 141, 171,
              166, 57, 5,  52, 70, 105, 134, 162, 192, 194, 139, 113, 127, 95, 40, 42, 72, 100, 129, 164, 181, 239, 177, 68,
              63,  94, 70, 53, 77, 92,  138, 155, 189, 224, 231, 120, 30,  56, 76, 81, 93, 117, 137, 158, 183, 207, 231, 242});
}

TEST_CASE("a window of a resize is that part of the whole", "[data]") {
  const uint64_t seed = 5;
  INFO("seed " << seed);
  RandomStream random(RandomKey::of(seed, "windows", 0));
  const Image image = test_image(31, 45, 3);
  for (int round = 0; round < 40; ++round) {
    const auto below = [&](int64_t n) { return static_cast<int64_t>(random.below(static_cast<uint64_t>(n))); };
    const auto how = round % 2 == 0 ? Interpolation::bilinear : Interpolation::bicubic;
    const int64_t height = 1 + below(60), width = 1 + below(60);
    const Box window{below(height), below(width), 0, 0};
    const Box part{window.y, window.x, 1 + below(height - window.y), 1 + below(width - window.x)};
    const Bytes whole = resized(image, height, width, how);
    Bytes cut(part.height * part.width * 3);
    resize(image, {0, 0, image.height, image.width}, height, width, part, how, cut.data());
    bool same = true;
    for (int64_t y = 0; y < part.height; ++y)
      same = same &&
             std::equal(&cut[y * part.width * 3], &cut[y * part.width * 3] + part.width * 3, &whole[((part.y + y) * width + part.x) * 3]);
    CHECK(same);
  }
}

TEST_CASE("very long pictures cost only their window", "[data]") {
  const Image line{1, 200'000, 3, Bytes(600'000, 9)};
  CHECK(evaluate(line, plain(64, 3)) == Bytes(64 * 64 * 3, 9));
  TransformOptions options = plain(64, 3);
  options.crop = Crop::resized;
  CHECK(train(line, options, 0) == Bytes(64 * 64 * 3, 9));
}

TEST_CASE("evaluation keeps pictures of the right size and cuts the centre of others", "[data]") {
  const Image image = test_image(32, 32, 3);
  CHECK(evaluate(image, plain(32, 3)) == image.pixels);
  TransformOptions options = plain(2, 1);
  options.crop_pct = 0.5;  // 4 x 4 stays as it is, then its middle
  const Image gray{4, 4, 1, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}};
  CHECK(evaluate(gray, options) == Bytes{5, 6, 9, 10});
  options = plain(2, 3);
  options.crop_pct = 0.5;
  CHECK(evaluate(gray, options) == Bytes{5, 5, 5, 6, 6, 6, 9, 9, 9, 10, 10, 10});
  CHECK(evaluate(test_image(32, 32, 3), plain(32, 1)) == convert_channels(test_image(32, 32, 3), 1).pixels);
}

TEST_CASE("flips mirror rows with their probability", "[data]") {
  TransformOptions options = plain(4, 3);
  const Image square = test_image(4, 4, 3);
  options.flip = 1;
  const Bytes flipped = train(square, options, 0);
  for (int y = 0; y < 4; ++y)
    for (int x = 0; x < 4; ++x)
      for (int c = 0; c < 3; ++c) CHECK(flipped[(y * 4 + x) * 3 + c] == square.pixels[(y * 4 + 3 - x) * 3 + c]);
  options.flip = 0.5;
  int flips = 0;
  for (int64_t i = 0; i < 400; ++i) flips += train(square, options, i) != square.pixels;
  CHECK(flips > 150);
  CHECK(flips < 250);
}

TEST_CASE("a flip may be left to whoever reads the picture, where nothing follows that asks for places", "[data]") {
  TransformOptions options = plain(6, 3);
  options.crop = Crop::resized;
  options.flip = options.vflip = 0.5;
  const Image image = test_image(9, 7, 3);
  const auto both = [&](int64_t i) {
    Bytes now(options.bytes()), later(options.bytes());
    uint8_t mirrored = 7;
    RandomStream random = augmentation_stream(3, 0, i), again = augmentation_stream(3, 0, i);
    transform_for_training(image, options, random, now.data());
    transform_for_training(image, options, again, later.data(), &mirrored);
    CHECK(mirrored <= 1);
    if (mirrored) pixels::mirror({later.data(), 6, 6, 3});
    CHECK(now == later);
    CHECK(random.uniform() == again.uniform());
    return mirrored != 0;
  };
  int left = 0;
  for (int64_t i = 0; i < 100; ++i) left += both(i);
  CHECK((left > 25 && left < 75));
  for (const auto& with : std::vector<std::function<void(TransformOptions&)>>{
           [](auto& o) { o.erasing.probability = 1; }, [](auto& o) { o.blur = 1; }, [](auto& o) { o.grayscale = 1; },
           [](auto& o) { o.color_jitter = ColorJitter(0.3); },
           [](auto& o) { o.augment = parse_augment("rand-m9-inc1", "data.auto_augment"); }}) {
    TransformOptions more = options;
    with(more);
    std::swap(options, more);
    for (int64_t i = 0; i < 20; ++i) CHECK_FALSE(both(i));
    std::swap(options, more);
  }
}

TEST_CASE("a shifted crop moves the picture over black by every offset", "[data]") {
  TransformOptions options = plain(8, 1);
  options.crop = Crop::pad;
  options.crop_padding = 2;
  Image image{8, 8, 1, Bytes(64, 0)};
  image.pixels[3 * 8 + 4] = 200;
  std::vector<int> seen(64, 0);
  for (int64_t i = 0; i < 500; ++i) {
    const Bytes out = train(image, options, i);
    REQUIRE(std::count(out.begin(), out.end(), 200) == 1);
    ++seen[std::find(out.begin(), out.end(), 200) - out.begin()];
  }
  for (int y = 0; y < 8; ++y)
    for (int x = 0; x < 8; ++x) CHECK((seen[y * 8 + x] > 0) == (std::abs(y - 3) <= 2 && std::abs(x - 4) <= 2));
}

TEST_CASE("random resized crops depend on (seed, epoch, index) alone and differ", "[data]") {
  TransformOptions options = plain(16, 3);
  options.crop = Crop::resized;
  options.color_jitter = 0.4;
  options.flip = 0.5;
  const Image image = test_image(40, 60, 3);
  CHECK(train(image, options, 1) == train(image, options, 1));
  CHECK(train(image, options, 1) != train(image, options, 2));
}

TEST_CASE("colour jitter leaves gray gray and a factor of one alone", "[data]") {
  TransformOptions options = plain(4, 3);
  options.color_jitter = 0.5;
  const Image gray{4, 4, 3, Bytes(48, 100)};
  for (int64_t i = 0; i < 20; ++i) {
    const Bytes out = train(gray, options, i);
    CHECK(std::all_of(out.begin(), out.end(), [&](uint8_t v) { return v == out[0]; }));
    CHECK(out[0] >= 49);
    CHECK(out[0] <= 150);
  }
  options.color_jitter = 1e-12;
  CHECK(train(gray, options, 0) == gray.pixels);
}

TEST_CASE("colour jitter turns each of its four by its own strength", "[data]") {
  TransformOptions options = plain(8, 3);
  const Image image = test_image(8, 8, 3);
  options.color_jitter = {0, 0, 0, 0.5};
  Image turned = image;
  pixels::hue({turned.pixels.data(), 8, 8, 3}, 0);
  std::set<Bytes> different;
  for (int64_t i = 0; i < 300; ++i) {
    const Bytes out = train(image, options, i);
    for (size_t p = 0; p < out.size(); p += 3)  // brightness, the V of HSV, stays
      REQUIRE(*std::max_element(out.begin() + p, out.begin() + p + 3) == *std::max_element(&image.pixels[p], &image.pixels[p] + 3));
    different.insert(out);
  }
  CHECK(different.size() > 150);
  options.color_jitter = {0, 0, 0, 1e-6};  // less than a step of the hue
  CHECK(train(image, options, 0) == turned.pixels);
  options.color_jitter = {0.5, 0, 0, 0};
  const Image flat{8, 8, 3, Bytes(192, 100)};
  int dark = 0, bright = 0;
  for (int64_t i = 0; i < 100; ++i) {
    const Bytes out = train(flat, options, i);
    dark += out[0]<75, bright += out[0]> 125;
  }
  CHECK(dark > 10);
  CHECK(bright > 10);
  options.color_jitter = {0, 0.9, 0.9, 0};  // neither contrast nor saturation changes a flat gray
  CHECK(train(flat, options, 3) == flat.pixels);
  options.color_jitter = {0, 0, 0, 0.6};
  CHECK_THAT(error_of([&] { options.validate(); }), Catch::Contains("hue must lie in 0..0.5"));
}

TEST_CASE("a simple crop is a square of the resized picture inside its reflection, at every offset", "[data][augment]") {
  const SafetensorsFile golden = read_safetensors(source_dir() + "/tests/golden/augment.safetensors");
  const Tensor &rgb = *golden.find("picture/rgb"), &padded = *golden.find("simple");  // 20 x 24; the shorter side at 12, and 4 around it
  const Bytes wide = padded.to_vector<uint8_t>();
  const int64_t rows = padded.dim(0), columns = padded.dim(1), side = 12;
  const Image image{static_cast<int>(rgb.dim(0)), static_cast<int>(rgb.dim(1)), 3, rgb.to_vector<uint8_t>()};
  std::map<Bytes, int> squares;
  for (int64_t y = 0; y + side <= rows; ++y)
    for (int64_t x = 0; x + side <= columns; ++x) {
      Bytes square;
      for (int64_t row = y; row < y + side; ++row)
        square.insert(square.end(), &wide[(row * columns + x) * 3], &wide[(row * columns + x) * 3] + side * 3);
      squares[square] = 0;
    }
  REQUIRE(squares.size() == 9 * 11);
  TransformOptions options = plain(side, 3);
  options.crop = Crop::simple;
  for (int64_t i = 0; i < 3000; ++i) {
    const auto found = squares.find(train(image, options, i));
    REQUIRE(found != squares.end());
    ++found->second;
  }
  for (const auto& square : squares) CHECK(square.second > 5);  // of 30 on average
  options.channels = 1;
  options.mean = options.std = {0.5f};
  CHECK(train(image, options, 0).size() == 144);
}

TEST_CASE("flips upside down, grayscale and blur come with their probabilities", "[data][augment]") {
  const Image image = test_image(16, 16, 3);
  TransformOptions options = plain(16, 3);
  Bytes upside_down;
  for (int y = 15; y >= 0; --y) upside_down.insert(upside_down.end(), &image.pixels[y * 48], &image.pixels[y * 48] + 48);
  options.vflip = 1;
  CHECK(train(image, options, 0) == upside_down);
  const Bytes gray = convert_channels(convert_channels(image, 1), 3).pixels;
  options.vflip = 0;
  options.grayscale = 1;
  CHECK(train(image, options, 0) == gray);
  const auto changed = [&](double TransformOptions::*probability) {
    TransformOptions some = plain(16, 3);
    some.*probability = 0.3;
    int count = 0;
    for (int64_t i = 0; i < 1000; ++i) count += train(image, some, i) != image.pixels;
    return count;
  };
  for (auto probability : {&TransformOptions::vflip, &TransformOptions::grayscale, &TransformOptions::blur})
    CHECK(std::abs(changed(probability) - 300) < 73);  // five standard deviations
}

TEST_CASE("operations come in timm's order", "[data][augment]") {
  // A shear of either sign brings the mean into the lower left corner, or nothing; grayscale and erasing come after it.
  const Image white{16, 16, 3, Bytes(16 * 16 * 3, 255)};
  TransformOptions options = plain(16, 3);
  options.mean = {1, 0, 0};
  options.augment.choices = {{AugmentOp::shear_x, 1, 10}};
  options.augment.probability = 1;
  options.augment.layers = 1;
  const auto corners = [&] {
    std::set<Bytes> seen;
    for (int64_t i = 0; i < 20; ++i) {
      const Bytes out = train(white, options, i);
      seen.insert(Bytes(&out[16 * 15 * 3], &out[16 * 15 * 3] + 3));
    }
    return seen;
  };
  CHECK(corners() == std::set<Bytes>{{255, 0, 0}, {255, 255, 255}});
  options.grayscale = 1;
  CHECK(corners() == std::set<Bytes>{{76, 76, 76}, {255, 255, 255}});
  options.augment = {};
  options.blur = 1;
  options.erasing.probability = 1;
  options.erasing.mode = ErasingMode::constant;
  for (int64_t i = 0; i < 20; ++i) {  // the erased rectangle is neither gray nor are its borders blurred
    const Bytes out = train(white, options, i);
    CHECK(std::count(out.begin(), out.end(), 0) >= 8);
    CHECK(std::count(out.begin(), out.end(), 0) + std::count(out.begin(), out.end(), 255) == 16 * 16 * 3);
  }
}

TEST_CASE("colour jitter stays away from RandAugment and goes with 3-Augment", "[data][augment]") {
  const Image image = test_image(16, 16, 3);
  const auto with_jitter = [&](const char* augment, double jitter) {
    TransformOptions options = plain(16, 3);
    options.augment = parse_augment(augment, "augment");
    options.color_jitter = jitter;
    return train(image, options, 3);
  };
  CHECK(with_jitter("rand-m9", 0.4) == with_jitter("rand-m9", 0));
  CHECK(with_jitter("rand-m9-t3a", 0.4) != with_jitter("rand-m9-t3a", 0));
  CHECK(with_jitter("3a", 0.4) != with_jitter("3a", 0));
}

TEST_CASE("a random filter resizes by either", "[data][augment]") {
  const Image image = test_image(40, 40, 3);
  TransformOptions options = plain(16, 3);
  const Bytes cubic = train(image, options, 0);
  options.interpolation = Interpolation::bilinear;
  const Bytes linear = train(image, options, 0);
  REQUIRE(cubic != linear);
  options.random_interpolation = true;
  int cubics = 0;
  for (int64_t i = 0; i < 200; ++i) {
    const Bytes out = train(image, options, i);
    REQUIRE((out == cubic || out == linear));
    cubics += out == cubic;
  }
  CHECK(std::abs(cubics - 100) < 36);
  CHECK(evaluate(image, options) == linear);
}

TEST_CASE("each repeat of a picture has random numbers of its own", "[data][augment]") {
  std::set<uint32_t> first;
  for (int64_t index = 0; index < 40; ++index)
    for (int64_t repeat = 0; repeat < 5; ++repeat) first.insert(augmentation_stream(7, 3, index, repeat).next());
  CHECK(first.size() == 200);
  CHECK(augmentation_stream(7, 3, 5, 0).next() == augmentation_stream(7, 3, 5).next());
}

TEST_CASE("all augmentations work on gray pictures and tiny ones", "[data][augment]") {
  for (int64_t channels : {1, 3})
    for (int64_t size : {1, 2, 9})
      for (const char* augment : {"3a", "rand-m10-n8-p1-inc1", "rand-n14-p1-t3aw"}) {
        TransformOptions options = plain(size, channels);
        options.augment = parse_augment(augment, "augment");
        options.color_jitter = options.grayscale = options.blur = options.erasing.probability = 1;
        options.random_interpolation = true;
        for (int64_t i = 0; i < 20; ++i) CHECK(train(test_image(7, 5, 3), options, i) == train(test_image(7, 5, 3), options, i));
      }
}

TEST_CASE("transform options out of range are refused", "[data]") {
  const auto broken = [](auto change) {
    TransformOptions options = plain(8, 3);
    change(options);
    return error_of([&] { options.validate(); });
  };
  CHECK(broken([](auto&) {}) == "");
  CHECK_THAT(broken([](auto& o) { o.image_size = 0; }), Catch::Contains("image_size"));
  CHECK_THAT(broken([](auto& o) { o.channels = 2; }), Catch::Contains("channels"));
  CHECK_THAT(broken([](auto& o) { o.scale = {0.5, 0.1}; }), Catch::Contains("scale"));
  CHECK_THAT(broken([](auto& o) { o.ratio = {0, 1}; }), Catch::Contains("ratio"));
  CHECK_THAT(broken([](auto& o) { o.flip = 1.5; }), Catch::Contains("flip"));
  CHECK_THAT(broken([](auto& o) { o.vflip = -1; }), Catch::Contains("vflip"));
  CHECK_THAT(broken([](auto& o) { o.grayscale = 2; }), Catch::Contains("grayscale"));
  CHECK_THAT(broken([](auto& o) { o.blur = NAN; }), Catch::Contains("blur"));
  CHECK_THAT(broken([](auto& o) { o.erasing.probability = 1.1; }), Catch::Contains("erasing"));
  CHECK_THAT(broken([](auto& o) { o.erasing.max_count = 0; }), Catch::Contains("max_count"));
  CHECK_THAT(broken([](auto& o) { o.crop = Crop::simple; }), Catch::Contains("half of image_size"));
  CHECK_THAT(broken([](auto& o) { o.crop_pct = 0; }), Catch::Contains("crop_pct"));
  CHECK_THAT(broken([](auto& o) { o.crop_padding = 9; }), Catch::Contains("crop_padding"));
  CHECK_THAT(broken([](auto& o) { o.mean.pop_back(); }), Catch::Contains("mean"));
  CHECK_THAT(broken([](auto& o) { o.std[1] = 0; }), Catch::Contains("std"));
  CHECK_THAT(error_of([] { parse_crop("random", "data.crop"); }), Catch::Contains("data.crop") && Catch::Contains("random"));
  CHECK_THAT(error_of([] { parse_interpolation("area", "data.interpolation"); }), Catch::Contains("data.interpolation"));
}
