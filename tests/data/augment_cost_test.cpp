// What augmentation costs a picture on one thread: mesa-tests "[augment-cost]". Hidden, as it measures time.
#include <algorithm>
#include <catch2/catch.hpp>
#include <chrono>
#include <cstdio>
#include <functional>

#include "mesa/data/transform.h"
#include "support/data_files.h"

using namespace mesa;
using namespace mesa::testing;

namespace {
/// A smooth picture with noise, as photographs have.
Image noisy(int height, int width) {
  Image image = test_image(height, width, 3);
  RandomStream random(RandomKey::of(1, "augment_cost", 0));
  for (uint8_t& v : image.pixels) v = static_cast<uint8_t>(std::min<uint64_t>(255, v + random.below(40)));
  return image;
}

/// Microseconds a call, the least of five rounds.
double cost(int calls, const std::function<void(int)>& call) {
  double least = 1e30;
  for (int round = 0; round < 5; ++round) {
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < calls; ++i) call(i);
    least = std::min(least, std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count() / calls);
  }
  return least;
}

TransformOptions recipe(int64_t size, const char* augment, double jitter, double erasing) {
  TransformOptions options;
  options.image_size = size;
  options.mean = {0.485f, 0.456f, 0.406f};
  options.std = {0.229f, 0.224f, 0.225f};
  options.crop = size > 32 ? Crop::resized : Crop::pad;
  options.augment = parse_augment(augment, "augment");
  options.color_jitter = jitter;
  options.erasing.probability = erasing;
  return options;
}
}  // namespace

TEST_CASE("the cost of augmentation", "[.][augment-cost]") {
  for (int size : {224, 32}) {
    const Image image = size > 32 ? noisy(375, 500) : noisy(32, 32);
    Bytes out(static_cast<size_t>(size) * size * 3);
    const auto of = [&](const char* name, const TransformOptions& options) {
      const double time = cost(size > 32 ? 200 : 5000, [&](int i) {
        RandomStream random = augmentation_stream(1, 0, i);
        transform_for_training(image, options, random, out.data());
      });
      std::printf("%3d x %-3d  %-42s %8.1f us\n", size, size, name, time);
    };
    of("crop and flip", recipe(size, "", 0, 0));
    of("colour jitter 0.4", recipe(size, "", 0.4, 0));
    of("rand-m9-mstd0.5-inc1", recipe(size, "rand-m9-mstd0.5-inc1", 0, 0));
    of("rand-m9-mstd0.5-inc1, erasing 0.25 (DeiT)", recipe(size, "rand-m9-mstd0.5-inc1", 0, 0.25));
    of("3a, colour jitter 0.3 (DeiT III)", recipe(size, "3a", 0.3, 0));
  }
}
