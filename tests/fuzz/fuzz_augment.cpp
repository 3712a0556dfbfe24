// Any text as data.augment: it is refused with a mesa::Error, or augments a small picture of its own bytes.
#include <cstdint>
#include <string>
#include <vector>

#include "mesa/base/error.h"
#include "mesa/data/augment.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  mesa::AugmentPolicy policy;
  try {
    policy = mesa::parse_augment(std::string(reinterpret_cast<const char*>(data), size), "fuzz");
  } catch (const mesa::Error&) {
    return 0;
  }
  const int64_t channels = size % 2 == 0 ? 3 : 1;
  std::vector<uint8_t> pixels(5 * 7 * channels);
  for (size_t i = 0; i < pixels.size() && size > 0; ++i) pixels[i] = data[i % size];
  for (uint64_t draw = 0; draw < 4; ++draw) {
    mesa::RandomStream random(mesa::RandomKey::of(size, "fuzz", draw));
    mesa::apply_augment(policy, {mesa::Interpolation::bicubic, true, {1, 2, 3}}, random, {pixels.data(), 5, 7, channels});
  }
  return 0;
}
