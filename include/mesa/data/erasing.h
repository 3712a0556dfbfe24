// Random erasing: rectangles of a picture are overwritten (Zhong et al., "Random Erasing Data Augmentation", AAAI 2020; as timm does it).
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "mesa/base/random.h"
#include "mesa/data/pixels.h"

namespace mesa {

/// What erased pixels become: the mean (`constant`), one random colour a rectangle, or random colours pixel by pixel.
enum class ErasingMode : uint8_t { constant, color, pixel };
/// "const", "rand" or "pixel"; anything else throws Error naming `key`.
ErasingMode parse_erasing_mode(const std::string& text, const std::string& key);

struct Erasing {
  double probability = 0;
  ErasingMode mode = ErasingMode::pixel;
  int64_t max_count = 1;           ///< rectangles: 1 to max_count, equally likely; they share the area
  double area[2]{0.02, 1.0 / 3};   ///< share of the picture, uniform
  double aspect[2]{0.3, 1 / 0.3};  ///< height / width, log-uniform
};

/// timm erases normalized pixels, with 0 or with N(0, 1) noise. Here pictures are bytes until they are normalized, so what is written is
/// round(255 (mean + std n)) with n = 0 or n ~ N(0, 1), clamped to 0..255: noise beyond what a picture can hold becomes 0 or 255 (3.3 % of
/// it with ImageNet's normalization). `mean` and `std` have one value a channel. A rectangle gets ten tries to be lower and narrower than
/// the picture.
void erase(const Pixels& p, const Erasing& erasing, const std::vector<float>& mean, const std::vector<float>& std, RandomStream& random);

}  // namespace mesa
