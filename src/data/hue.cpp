// The hue of a picture, turned in Pillow's HSV of three bytes (Convert.c, which follows Python's colorsys).
#include <algorithm>
#include <cmath>

#include "mesa/data/pixels.h"

namespace mesa::pixels {

namespace {
struct Hsv {
  uint8_t h, s, v;
};

// Where Pillow computes in float and where in double decides the last bit, so that both are kept.
Hsv to_hsv(int r, int g, int b) {
  const int high = std::max({r, g, b}), low = std::min({r, g, b});
  if (high == low) return {0, 0, static_cast<uint8_t>(high)};
  const float range = static_cast<float>(high - low), s = range / static_cast<float>(high);
  const float rc = static_cast<float>(high - r) / range, gc = static_cast<float>(high - g) / range,
              bc = static_cast<float>(high - b) / range;
  float h = r == high   ? bc - gc
            : g == high ? static_cast<float>(2.0 + static_cast<double>(rc) - static_cast<double>(bc))
                        : static_cast<float>(4.0 + static_cast<double>(gc) - static_cast<double>(rc));
  h = static_cast<float>(std::fmod(static_cast<double>(h) / 6.0 + 1.0, 1.0));
  return {static_cast<uint8_t>(static_cast<double>(h) * 255.0), static_cast<uint8_t>(static_cast<double>(s) * 255.0),
          static_cast<uint8_t>(high)};
}

void from_hsv(const Hsv& hsv, uint8_t* rgb) {
  const uint8_t v = hsv.v;
  if (hsv.s == 0) {
    rgb[0] = rgb[1] = rgb[2] = v;
    return;
  }
  const double sixth = static_cast<double>(hsv.h) * 6.0 / 255.0;
  const int i = static_cast<int>(sixth);
  const auto f = static_cast<float>(sixth - i), s = static_cast<float>(hsv.s / 255.0);
  const auto part = [&](double x) { return static_cast<uint8_t>(std::clamp(std::round(v * (1.0 - x)), 0.0, 255.0)); };
  const uint8_t p = part(s), q = part(s * f), t = part(static_cast<double>(s) * (1.0 - static_cast<double>(f)));
  const uint8_t colors[6][3] = {{v, t, p}, {q, v, p}, {p, v, t}, {p, q, v}, {t, p, v}, {v, p, q}};
  std::copy_n(colors[i % 6], 3, rgb);
}
}  // namespace

void hue(const Pixels& p, double turn) {
  if (p.channels != 3) return;
  const auto add = static_cast<uint8_t>(static_cast<int>(turn * 255));
  for (int64_t i = 0; i < p.bytes(); i += 3) {
    Hsv hsv = to_hsv(p.data[i], p.data[i + 1], p.data[i + 2]);
    hsv.h = static_cast<uint8_t>(hsv.h + add);
    from_hsv(hsv, p.data + i);
  }
}

}  // namespace mesa::pixels
