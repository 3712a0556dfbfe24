#include "mesa/models/resize.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

namespace mesa {
namespace {

/// The four neighbours of a place and their weights.
struct Taps {
  std::array<int64_t, 4> at;
  std::array<double, 4> weight;
};

std::vector<Taps> taps_of(int64_t from, int64_t to) {
  constexpr double a = -0.75;
  const auto near = [](double t) { return ((a + 2) * t - (a + 3)) * t * t + 1; };       // |t| <= 1
  const auto far = [](double t) { return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a; };  // 1 < |t| < 2
  std::vector<Taps> all;
  for (int64_t i = 0; i < to; ++i) {
    const double place = (static_cast<double>(i) + 0.5) * static_cast<double>(from) / static_cast<double>(to) - 0.5;
    const double below = std::floor(place), t = place - below;
    Taps taps{{}, {far(t + 1), near(t), near(1 - t), far(2 - t)}};
    for (int k = 0; k < 4; ++k) taps.at[k] = std::clamp<int64_t>(static_cast<int64_t>(below) - 1 + k, 0, from - 1);
    all.push_back(taps);
  }
  return all;
}

}  // namespace

Tensor resize_bicubic(const Tensor& rows, int64_t height, int64_t width, int64_t to_height, int64_t to_width) {
  check(
      rows.rank() == 2 && rows.is_contiguous() && height > 0 && width > 0 && rows.dim(0) == height * width && to_height > 0 && to_width > 0,
      "cannot resize ", rows.shape(), " as a grid of ", height, " x ", width, " to ", to_height, " x ", to_width);
  const int64_t C = rows.dim(1);
  const Tensor out = Tensor::empty({to_height * to_width, C}, DType::f32);
  const float* in = rows.data<float>();
  const std::vector<Taps> down = taps_of(height, to_height), across = taps_of(width, to_width);
  for (int64_t y = 0; y < to_height; ++y)
    for (int64_t x = 0; x < to_width; ++x)
      for (int64_t c = 0; c < C; ++c) {
        double sum = 0;
        for (int i = 0; i < 4; ++i)
          for (int j = 0; j < 4; ++j)
            sum += down[y].weight[i] * across[x].weight[j] * static_cast<double>(in[(down[y].at[i] * width + across[x].at[j]) * C + c]);
        out.data<float>()[(y * to_width + x) * C + c] = static_cast<float>(sum);
      }
  return out;
}

}  // namespace mesa
