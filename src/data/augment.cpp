#include "mesa/data/augment.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace mesa {

double augment_argument(AugmentOp op, double magnitude, RandomStream& random) {
  const double level = magnitude / 10;
  const auto with_sign = [&](double x) { return random.uniform() > 0.5 ? -x : x; };
  switch (op) {
    case AugmentOp::auto_contrast:
    case AugmentOp::equalize:
    case AugmentOp::invert: return 0;
    case AugmentOp::rotate: return with_sign(level * 30);
    case AugmentOp::posterize: return std::trunc(level * 4);
    case AugmentOp::posterize_increasing: return 4 - std::trunc(level * 4);
    case AugmentOp::solarize: return std::min(256.0, std::trunc(level * 256));
    case AugmentOp::solarize_increasing: return 256 - std::min(256.0, std::trunc(level * 256));
    case AugmentOp::solarize_add: return std::min(128.0, std::trunc(level * 110));
    case AugmentOp::color:
    case AugmentOp::contrast:
    case AugmentOp::brightness:
    case AugmentOp::sharpness: return level * 1.8 + 0.1;
    case AugmentOp::color_increasing:
    case AugmentOp::contrast_increasing:
    case AugmentOp::brightness_increasing:
    case AugmentOp::sharpness_increasing: return std::max(0.1, 1.0 + with_sign(level * .9));
    case AugmentOp::shear_x:
    case AugmentOp::shear_y: return with_sign(level * 0.3);
    case AugmentOp::translate_x:
    case AugmentOp::translate_y: return with_sign(level * 0.45);
    case AugmentOp::desaturate: return std::clamp(0.5 + (1.0 - 0.5) * level, 0.5, 1.0);
    case AugmentOp::gaussian_blur: return std::clamp(0.1 + (2.0 - 0.1) * level, 0.1, 2.0);
    case AugmentOp::gaussian_blur_rand: return random.uniform(0.1, 2.0 * std::clamp(level, 0.0, 1.0));
  }
  return 0;
}

void apply_augment_op(AugmentOp op, double argument, Interpolation interpolation, const Color& fill, const Pixels& p) {
  const auto factor = static_cast<float>(argument);
  const auto whole = static_cast<int>(argument);
  switch (op) {
    case AugmentOp::auto_contrast: return pixels::autocontrast(p);
    case AugmentOp::equalize: return pixels::equalize(p);
    case AugmentOp::invert: return pixels::invert(p);
    case AugmentOp::rotate: return pixels::rotate(p, argument, interpolation, fill);
    case AugmentOp::posterize:
    case AugmentOp::posterize_increasing: return pixels::posterize(p, whole);
    case AugmentOp::solarize:
    case AugmentOp::solarize_increasing: return pixels::solarize(p, whole);
    case AugmentOp::solarize_add: return pixels::solarize_add(p, whole);
    case AugmentOp::color:
    case AugmentOp::color_increasing: return pixels::color(p, factor);
    case AugmentOp::contrast:
    case AugmentOp::contrast_increasing: return pixels::contrast(p, factor);
    case AugmentOp::brightness:
    case AugmentOp::brightness_increasing: return pixels::brightness(p, factor);
    case AugmentOp::sharpness:
    case AugmentOp::sharpness_increasing: return pixels::sharpness(p, factor);
    case AugmentOp::shear_x: return pixels::affine(p, {1, argument, 0, 0, 1, 0}, interpolation, fill);
    case AugmentOp::shear_y: return pixels::affine(p, {1, 0, 0, argument, 1, 0}, interpolation, fill);
    case AugmentOp::translate_x: return pixels::affine(p, {1, 0, argument * static_cast<double>(p.width), 0, 1, 0}, interpolation, fill);
    case AugmentOp::translate_y: return pixels::affine(p, {1, 0, 0, 0, 1, argument * static_cast<double>(p.height)}, interpolation, fill);
    case AugmentOp::desaturate: return pixels::color(p, static_cast<float>(std::clamp(1 - argument, 0.0, 1.0)));
    case AugmentOp::gaussian_blur:
    case AugmentOp::gaussian_blur_rand: return pixels::gaussian_blur(p, argument);
  }
}

namespace {
/// The index of one of the weights, with a probability in proportion to it; a weight of 0 is never picked.
size_t pick(const std::vector<double>& weights, RandomStream& random) {
  double at = random.uniform() * std::accumulate(weights.begin(), weights.end(), 0.0);
  size_t picked = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i] <= 0) continue;
    picked = i;  // the last one also where rounding leaves a rest
    if (at < weights[i]) break;
    at -= weights[i];
  }
  return picked;
}

double draw_magnitude(const AugmentPolicy& policy, double magnitude, RandomStream& random) {
  if (std::isinf(policy.magnitude_std))
    magnitude = random.uniform(0, magnitude);
  else if (policy.magnitude_std > 0)
    magnitude += policy.magnitude_std * random.normal();
  return std::clamp(magnitude, 0.0, policy.magnitude_max);
}

bool is_geometric(AugmentOp op) {
  return op == AugmentOp::rotate || op == AugmentOp::shear_x || op == AugmentOp::shear_y || op == AugmentOp::translate_x ||
         op == AugmentOp::translate_y;
}
}  // namespace

void apply_augment(const AugmentPolicy& policy, const AugmentSampling& sampling, RandomStream& random, const Pixels& p) {
  if (policy.choices.empty()) return;
  std::vector<double> weights;
  for (const auto& choice : policy.choices) weights.push_back(choice.weight);
  std::vector<size_t> layers;  // all are picked before the first is applied, as timm does
  for (int64_t i = 0; i < policy.layers; ++i) {
    layers.push_back(pick(weights, random));
    if (!policy.repeats) weights[layers.back()] = 0;
  }
  for (size_t layer : layers) {
    if (policy.probability < 1 && random.uniform() >= policy.probability) continue;
    const AugmentPolicy::Choice& choice = policy.choices[layer];
    const double argument = augment_argument(choice.op, draw_magnitude(policy, choice.magnitude, random), random);
    Interpolation interpolation = sampling.interpolation;
    if (sampling.random_interpolation && is_geometric(choice.op))
      interpolation = random.below(2) == 0 ? Interpolation::bilinear : Interpolation::bicubic;
    apply_augment_op(choice.op, argument, interpolation, sampling.fill, p);
  }
}

}  // namespace mesa
