#include "mesa/data/transform.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "mesa/base/error.h"

namespace mesa {

Crop parse_crop(const std::string& text, const std::string& key) {
  if (text == "none") return Crop::none;
  if (text == "pad") return Crop::pad;
  check(text == "resized", key, " must be none, pad or resized, it is '", text, "'");
  return Crop::resized;
}

void TransformOptions::validate() const {
  check(image_size > 0 && image_size <= 16384, "image_size must lie in 1..16384, it is ", image_size);
  check(channels == 1 || channels == 3, "channels must be 1 or 3, it is ", channels);
  check(crop_padding >= 0 && crop_padding <= image_size, "crop_padding must lie in 0..image_size, it is ", crop_padding);
  check(scale[0] > 0 && scale[0] <= scale[1] && scale[1] <= 1, "scale must be two rising shares in (0, 1], it is ", scale[0], ", ",
        scale[1]);
  check(ratio[0] > 0 && ratio[0] <= ratio[1] && std::isfinite(ratio[1]), "ratio must be two rising positive numbers, it is ", ratio[0],
        ", ", ratio[1]);
  check(flip >= 0 && flip <= 1, "flip must be a probability, it is ", flip);
  check(color_jitter >= 0 && std::isfinite(color_jitter), "color_jitter must not be negative, it is ", color_jitter);
  check(crop_pct > 0 && crop_pct <= 1, "crop_pct must lie in (0, 1], it is ", crop_pct);
  check(static_cast<int64_t>(mean.size()) == channels && static_cast<int64_t>(std.size()) == channels,
        "mean and std need one value for each of ", channels, " channels, they have ", mean.size(), " and ", std.size());
  for (float s : std) check(s > 0 && std::isfinite(s), "std must be positive, it is ", s);
}

RandomStream augmentation_stream(uint64_t seed, int64_t epoch, int64_t index) {
  RandomKey key = RandomKey::of(seed, "data.augment", static_cast<uint64_t>(epoch));
  key.key = mix64(key.key ^ mix64(static_cast<uint64_t>(index)));
  return RandomStream(key);
}

namespace {
/// Resizes part of an image into `out`. RGB is reduced to gray before (as Pillow loads it); gray is repeated afterwards, which is the same
/// as before but cheaper.
void resize_to(const Image& image, const Box& crop, int64_t height, int64_t width, const Box& window, const TransformOptions& options,
               uint8_t* out) {
  if (image.channels > options.channels)
    return resize(convert_channels(image, static_cast<int>(options.channels)), crop, height, width, window, options.interpolation, out);
  resize(image, crop, height, width, window, options.interpolation, out);
  if (image.channels < options.channels)  // spread from the back, in place
    for (int64_t i = window.height * window.width - 1; i >= 0; --i) std::memset(out + 3 * i, out[i], 3);
}

/// Torchvision's RandomResizedCrop: ten tries, then the largest centred part with a ratio inside the limits.
Box random_part(const Image& image, const TransformOptions& options, RandomStream& random) {
  const double area = static_cast<double>(image.height) * image.width;
  for (int tries = 0; tries < 10; ++tries) {
    const double target = area * random.uniform(options.scale[0], options.scale[1]);
    const double ratio = std::exp(random.uniform(std::log(options.ratio[0]), std::log(options.ratio[1])));
    const auto width = static_cast<int64_t>(std::nearbyint(std::sqrt(target * ratio)));
    const auto height = static_cast<int64_t>(std::nearbyint(std::sqrt(target / ratio)));
    if (width < 1 || height < 1 || width > image.width || height > image.height) continue;
    const auto y = static_cast<int64_t>(random.below(static_cast<uint64_t>(image.height - height + 1)));
    const auto x = static_cast<int64_t>(random.below(static_cast<uint64_t>(image.width - width + 1)));
    return {y, x, height, width};
  }
  int64_t height = image.height, width = image.width;
  const double ratio = static_cast<double>(width) / static_cast<double>(height);
  if (ratio < options.ratio[0]) height = std::clamp<int64_t>(std::llround(static_cast<double>(width) / options.ratio[0]), 1, height);
  if (ratio > options.ratio[1]) width = std::clamp<int64_t>(std::llround(static_cast<double>(height) * options.ratio[1]), 1, width);
  return {(image.height - height) / 2, (image.width - width) / 2, height, width};
}

/// Moves a picture by (dy, dx) pixels; what comes in from outside is black.
void shift(const TransformOptions& options, int64_t dy, int64_t dx, uint8_t* pixels) {
  const int64_t size = options.image_size, row = size * options.channels;
  thread_local std::vector<uint8_t> from;
  from.assign(pixels, pixels + options.bytes());
  std::memset(pixels, 0, from.size());
  const int64_t y0 = std::max<int64_t>(dy, 0), y1 = std::min(size, size + dy);
  const int64_t x0 = std::max<int64_t>(dx, 0), count = size - std::abs(dx);
  for (int64_t y = y0; y < y1; ++y)
    if (count > 0)
      std::memcpy(pixels + y * row + x0 * options.channels, from.data() + (y - dy) * row + (x0 - dx) * options.channels,
                  count * options.channels);
}

void mirror(const TransformOptions& options, uint8_t* pixels) {
  const int64_t size = options.image_size, channels = options.channels;
  for (int64_t y = 0; y < size; ++y, pixels += size * channels)
    for (int64_t left = 0, right = size - 1; left < right; ++left, --right)
      for (int64_t c = 0; c < channels; ++c) std::swap(pixels[left * channels + c], pixels[right * channels + c]);
}

/// Pillow's Image.blend: from `base` (factor 0) through `value` (factor 1) and beyond, cut to bytes.
uint8_t blend(int base, int value, float factor) {
  return static_cast<uint8_t>(std::clamp(static_cast<float>(base) + factor * static_cast<float>(value - base), 0.0f, 255.0f));
}

int luma(const uint8_t* p) { return static_cast<int>((p[0] * 19595u + p[1] * 38470u + p[2] * 7471u + 0x8000u) >> 16); }

void change_brightness(uint8_t* pixels, int64_t count, float factor) {
  for (int64_t i = 0; i < count; ++i) pixels[i] = blend(0, pixels[i], factor);
}

void change_contrast(uint8_t* pixels, int64_t count, int64_t channels, float factor) {
  int64_t sum = 0;
  for (int64_t i = 0; i < count; i += channels) sum += channels == 3 ? luma(pixels + i) : pixels[i];
  const int mean = static_cast<int>(static_cast<double>(sum) / static_cast<double>(count / channels) + 0.5);
  for (int64_t i = 0; i < count; ++i) pixels[i] = blend(mean, pixels[i], factor);
}

void change_saturation(uint8_t* pixels, int64_t count, int64_t channels, float factor) {
  if (channels != 3) return;
  for (int64_t i = 0; i < count; i += 3) {
    const int gray = luma(pixels + i);
    for (int c = 0; c < 3; ++c) pixels[i + c] = blend(gray, pixels[i + c], factor);
  }
}

/// Brightness, contrast and saturation in random order, each by a random factor.
void jitter_colors(const TransformOptions& options, RandomStream& random, uint8_t* pixels) {
  int order[] = {0, 1, 2};
  for (int i = 2; i > 0; --i) std::swap(order[i], order[random.below(static_cast<uint64_t>(i) + 1)]);
  for (int which : order) {
    const auto factor = static_cast<float>(random.uniform(std::max(0.0, 1 - options.color_jitter), 1 + options.color_jitter));
    if (which == 0) change_brightness(pixels, options.bytes(), factor);
    if (which == 1) change_contrast(pixels, options.bytes(), options.channels, factor);
    if (which == 2) change_saturation(pixels, options.bytes(), options.channels, factor);
  }
}

Box whole(const Image& image) { return {0, 0, image.height, image.width}; }

/// Resizes so that the shorter side becomes `shorter` (the longer one rounded down, as torchvision does) and cuts the centre out.
void resize_and_cut(const Image& image, const TransformOptions& options, int64_t shorter, uint8_t* out) {
  const int64_t height = image.height <= image.width ? shorter : shorter * image.height / image.width;
  const int64_t width = image.height <= image.width ? shorter * image.width / image.height : shorter;
  const auto middle = [&](int64_t extent) {
    return static_cast<int64_t>(std::nearbyint(static_cast<double>(extent - options.image_size) / 2));
  };
  resize_to(image, whole(image), height, width, {middle(height), middle(width), options.image_size, options.image_size}, options, out);
}
}  // namespace

void transform_for_training(const Image& image, const TransformOptions& options, RandomStream& random, uint8_t* out) {
  const int64_t size = options.image_size;
  switch (options.crop) {
    case Crop::resized: resize_to(image, random_part(image, options, random), size, size, {0, 0, size, size}, options, out); break;
    case Crop::pad: {
      resize_and_cut(image, options, size, out);
      const auto offset = [&] { return static_cast<int64_t>(random.below(2 * options.crop_padding + 1)) - options.crop_padding; };
      const int64_t dy = offset(), dx = offset();
      shift(options, dy, dx, out);
      break;
    }
    case Crop::none: transform_for_evaluation(image, options, out); break;
  }
  if (options.flip > 0 && random.uniform() < options.flip) mirror(options, out);
  if (options.color_jitter > 0) jitter_colors(options, random, out);
}

void transform_for_evaluation(const Image& image, const TransformOptions& options, uint8_t* out) {
  const auto shorter = static_cast<int64_t>(std::floor(static_cast<double>(options.image_size) / options.crop_pct));
  resize_and_cut(image, options, shorter, out);
}

}  // namespace mesa
