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
  if (text == "resized") return Crop::resized;
  check(text == "simple", key, " must be none, pad, resized or simple, it is '", text, "'");
  return Crop::simple;
}

void TransformOptions::validate() const {
  check(image_size > 0 && image_size <= 16384, "image_size must lie in 1..16384, it is ", image_size);
  check(channels == 1 || channels == 3, "channels must be 1 or 3, it is ", channels);
  check(crop_padding >= 0 && crop_padding <= image_size, "crop_padding must lie in 0..image_size, it is ", crop_padding);
  check(crop != Crop::simple || 2 * crop_padding < image_size, "crop_padding must be less than half of image_size to be reflected, it is ",
        crop_padding);
  check(scale[0] > 0 && scale[0] <= scale[1] && scale[1] <= 1, "scale must be two rising shares in (0, 1], it is ", scale[0], ", ",
        scale[1]);
  check(ratio[0] > 0 && ratio[0] <= ratio[1] && std::isfinite(ratio[1]), "ratio must be two rising positive numbers, it is ", ratio[0],
        ", ", ratio[1]);
  const auto probability = [](const char* name, double p) { check(p >= 0 && p <= 1, name, " must be a probability, it is ", p); };
  probability("flip", flip);
  probability("vflip", vflip);
  probability("grayscale", grayscale);
  probability("blur", blur);
  probability("erasing", erasing.probability);
  check(erasing.max_count >= 1, "erasing must take at least one rectangle, max_count is ", erasing.max_count);
  for (const double x : {color_jitter.brightness, color_jitter.contrast, color_jitter.saturation})
    check(x >= 0 && std::isfinite(x), "color_jitter must not be negative, it is ", x);
  check(color_jitter.hue >= 0 && color_jitter.hue <= 0.5, "color_jitter's hue must lie in 0..0.5, it is ", color_jitter.hue);
  check(crop_pct > 0 && crop_pct <= 1, "crop_pct must lie in (0, 1], it is ", crop_pct);
  check(static_cast<int64_t>(mean.size()) == channels && static_cast<int64_t>(std.size()) == channels,
        "mean and std need one value for each of ", channels, " channels, they have ", mean.size(), " and ", std.size());
  for (float s : std) check(s > 0 && std::isfinite(s), "std must be positive, it is ", s);
}

RandomStream augmentation_stream(uint64_t seed, int64_t epoch, int64_t index, int64_t repeat) {
  RandomKey key = RandomKey::of(seed, "data.augment", static_cast<uint64_t>(epoch));
  key.key = mix64(key.key ^ mix64(static_cast<uint64_t>(index)));
  if (repeat > 0) key.key = mix64(key.key ^ mix64(~static_cast<uint64_t>(repeat)));
  return RandomStream(key);
}

namespace {
/// Resizes part of an image into `out`. RGB is reduced to gray before (as Pillow loads it); gray is repeated afterwards, which is the same
/// as before but cheaper.
void resize_to(const Image& image, const Box& crop, int64_t height, int64_t width, const Box& window, const TransformOptions& options,
               Interpolation interpolation, uint8_t* out) {
  if (image.channels > options.channels)
    return resize(convert_channels(image, static_cast<int>(options.channels)), crop, height, width, window, interpolation, out);
  resize(image, crop, height, width, window, interpolation, out);
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

/// Brightness, contrast, saturation and, where it is on, hue in random order, each by a random amount.
void jitter_colors(const ColorJitter& jitter, RandomStream& random, const Pixels& p) {
  int order[] = {0, 1, 2, 3};
  const int count = jitter.hue > 0 ? 4 : 3;  // without hue the random numbers are those of three
  for (int i = count - 1; i > 0; --i) std::swap(order[i], order[random.below(static_cast<uint64_t>(i) + 1)]);
  const auto factor = [&](double x) { return static_cast<float>(random.uniform(std::max(0.0, 1 - x), 1 + x)); };
  for (int i = 0; i < count; ++i) {
    if (order[i] == 0) pixels::brightness(p, factor(jitter.brightness));
    if (order[i] == 1) pixels::contrast(p, factor(jitter.contrast));
    if (order[i] == 2) pixels::color(p, factor(jitter.saturation));
    if (order[i] == 3) pixels::hue(p, random.uniform(-jitter.hue, jitter.hue));
  }
}

/// What the shorter side becomes before the centre is cut out.
int64_t evaluation_side(const TransformOptions& options) {
  return static_cast<int64_t>(std::floor(static_cast<double>(options.image_size) / options.crop_pct));
}

Box whole(const Image& image) { return {0, 0, image.height, image.width}; }

struct Extent {
  int64_t height, width;
};
/// The size with a shorter side of `shorter`; the longer one is rounded down, as torchvision does.
Extent with_shorter_side(const Image& image, int64_t shorter) {
  return {image.height <= image.width ? shorter : shorter * image.height / image.width,
          image.height <= image.width ? shorter * image.width / image.height : shorter};
}

/// Resizes so that the shorter side becomes `shorter` and cuts the centre out.
void resize_and_cut(const Image& image, const TransformOptions& options, int64_t shorter, Interpolation interpolation, uint8_t* out) {
  const Extent size = with_shorter_side(image, shorter);
  const auto middle = [&](int64_t extent) {
    return static_cast<int64_t>(std::nearbyint(static_cast<double>(extent - options.image_size) / 2));
  };
  resize_to(image, whole(image), size.height, size.width, {middle(size.height), middle(size.width), options.image_size, options.image_size},
            options, interpolation, out);
}

/// A random square of the resized picture inside its reflection, which leaves out the outermost pixels themselves (torchvision's RandomCrop
/// with padding_mode "reflect"). Only what lies in the square is resized: as the padding is less than half of it, that has all to reflect.
void simple_crop(const Image& image, const TransformOptions& options, Interpolation interpolation, RandomStream& random, uint8_t* out) {
  const int64_t side = options.image_size, padding = options.crop_padding, channels = options.channels;
  const Extent size = with_shorter_side(image, side);
  const auto offset = [&](int64_t extent) {
    return static_cast<int64_t>(random.below(static_cast<uint64_t>(extent + 2 * padding - side + 1))) - padding;
  };
  const int64_t top = offset(size.height), left = offset(size.width);
  const int64_t y0 = std::max<int64_t>(top, 0), x0 = std::max<int64_t>(left, 0);
  const Box inside{y0, x0, std::min(top + side, size.height) - y0, std::min(left + side, size.width) - x0};
  thread_local std::vector<uint8_t> part;
  part.resize(inside.height * inside.width * channels);
  resize_to(image, whole(image), size.height, size.width, inside, options, interpolation, part.data());
  const auto reflected = [](int64_t at, int64_t extent) { return at < 0 ? -at : at >= extent ? 2 * (extent - 1) - at : at; };
  for (int64_t y = 0; y < side; ++y) {
    const uint8_t* row = part.data() + (reflected(top + y, size.height) - inside.y) * inside.width * channels;
    uint8_t* to = out + y * side * channels;
    const auto outside = [&](int64_t from, int64_t end) {
      for (int64_t x = from; x < end; ++x)
        std::memcpy(to + x * channels, row + (reflected(left + x, size.width) - inside.x) * channels, channels);
    };
    outside(0, inside.x - left);
    std::memcpy(to + (inside.x - left) * channels, row, inside.width * channels);
    outside(inside.x - left + inside.width, side);
  }
}

void crop_for_training(const Image& image, const TransformOptions& options, RandomStream& random, uint8_t* out) {
  const int64_t size = options.image_size;
  Interpolation interpolation = options.interpolation;
  if (options.random_interpolation) interpolation = random.below(2) == 0 ? Interpolation::bilinear : Interpolation::bicubic;
  switch (options.crop) {
    case Crop::resized:
      resize_to(image, random_part(image, options, random), size, size, {0, 0, size, size}, options, interpolation, out);
      break;
    case Crop::pad: {
      resize_and_cut(image, options, size, interpolation, out);
      const auto offset = [&] { return static_cast<int64_t>(random.below(2 * options.crop_padding + 1)) - options.crop_padding; };
      const int64_t dy = offset(), dx = offset();
      shift(options, dy, dx, out);
      break;
    }
    case Crop::simple: simple_crop(image, options, interpolation, random, out); break;
    case Crop::none: resize_and_cut(image, options, evaluation_side(options), interpolation, out); break;
  }
}
}  // namespace

void transform_for_training(const Image& image, const TransformOptions& options, RandomStream& random, uint8_t* out, uint8_t* mirrored) {
  crop_for_training(image, options, random, out);
  const Pixels p{out, options.image_size, options.image_size, options.channels};
  const auto happens = [&](double probability) { return probability > 0 && random.uniform() < probability; };
  const bool mirror = happens(options.flip), later = mirrored != nullptr && options.flips_last();
  if (mirror && !later) pixels::mirror(p);
  if (mirrored != nullptr) *mirrored = mirror && later;
  if (happens(options.vflip)) pixels::flip_vertically(p);
  apply_augment(options.augment, {options.interpolation, options.random_interpolation, color_of(options.mean)}, random, p);
  if (options.color_jitter.on() && options.augment.color_jitter) jitter_colors(options.color_jitter, random, p);
  if (happens(options.grayscale)) pixels::grayscale(p);
  if (happens(options.blur)) pixels::gaussian_blur(p, random.uniform(0.1, 2));
  erase(p, options.erasing, options.mean, options.std, random);
}

void transform_for_evaluation(const Image& image, const TransformOptions& options, uint8_t* out) {
  resize_and_cut(image, options, evaluation_side(options), options.interpolation, out);
}

}  // namespace mesa
