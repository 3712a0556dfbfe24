// Fuzzing entry: bytes as a picture file, through the decoders and, where they are one, through the training transform.
#include "mesa/base/error.h"
#include "mesa/data/transform.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  try {
    const mesa::Image image = mesa::decode_image(bytes, size, "fuzz", {1 << 22, size % 2 == 0 ? 0 : 16});
    mesa::TransformOptions options;
    options.crop = size % 3 == 0 ? mesa::Crop::simple : mesa::Crop::resized;
    options.augment = mesa::parse_augment(size % 5 == 0 ? "3a" : "rand-m9-n4-p1-mstd2-inc1", "fuzz");
    options.color_jitter = 0.4;
    options.blur = options.erasing.probability = 0.5;
    std::vector<uint8_t> out(static_cast<size_t>(options.bytes()));
    mesa::RandomStream random = mesa::augmentation_stream(0, 0, static_cast<int64_t>(size));
    mesa::transform_for_training(image, options, random, out.data());
    mesa::transform_for_evaluation(image, options, out.data());
  } catch (const mesa::Error&) {
  }
  return 0;
}
