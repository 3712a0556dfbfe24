#include "mesa/data/pixels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace mesa {

Color color_of(const std::vector<float>& values) {
  Color color{};
  for (size_t c = 0; c < std::min(values.size(), color.size()); ++c)
    color[c] = static_cast<uint8_t>(std::clamp(std::nearbyint(255.0 * static_cast<double>(values[c])), 0.0, 255.0));
  return color;
}

}  // namespace mesa

namespace mesa::pixels {

void mirror(const Pixels& p) {
  for (int64_t y = 0; y < p.height; ++y) {
    uint8_t* row = p.data + y * p.width * p.channels;
    for (int64_t left = 0, right = p.width - 1; left < right; ++left, --right)
      for (int64_t c = 0; c < p.channels; ++c) std::swap(row[left * p.channels + c], row[right * p.channels + c]);
  }
}

void flip_vertically(const Pixels& p) {
  const int64_t row = p.width * p.channels;
  for (int64_t top = 0, bottom = p.height - 1; top < bottom; ++top, --bottom)
    std::swap_ranges(p.data + top * row, p.data + (top + 1) * row, p.data + bottom * row);
}

namespace {
using Table = std::array<uint8_t, 256>;
using Histogram = std::array<int64_t, 256>;

template <class F>
Table table_of(F&& value) {
  Table table;
  for (int i = 0; i < 256; ++i) table[i] = static_cast<uint8_t>(std::clamp<int64_t>(value(i), 0, 255));
  return table;
}

void look_up(const Pixels& p, const Table& table) {
  for (int64_t i = 0; i < p.bytes(); ++i) p.data[i] = table[p.data[i]];
}

/// Each channel through the table that is made of its histogram.
void look_up_by_histogram(const Pixels& p, Table (*table_for)(const Histogram&)) {
  std::array<Histogram, 3> histograms{};
  std::array<Table, 3> tables;
  for (int64_t i = 0; i < p.bytes(); i += p.channels)
    for (int64_t c = 0; c < p.channels; ++c) ++histograms[c][p.data[i + c]];
  for (int64_t c = 0; c < p.channels; ++c) tables[c] = table_for(histograms[c]);
  for (int64_t i = 0; i < p.bytes(); i += p.channels)
    for (int64_t c = 0; c < p.channels; ++c) p.data[i + c] = tables[c][p.data[i + c]];
}

Table stretching(const Histogram& h) {
  int low = 0, high = 255;
  while (low < 255 && h[low] == 0) ++low;
  while (high > 0 && h[high] == 0) --high;
  if (high <= low) return table_of([](int i) { return i; });
  const double scale = 255.0 / (high - low), offset = -low * scale;
  return table_of([&](int i) { return static_cast<int64_t>(i * scale + offset); });
}

Table equalizing(const Histogram& h) {
  int64_t total = 0, last = 0;
  for (int64_t n : h) {
    total += n;
    if (n > 0) last = n;
  }
  const int64_t step = (total - last) / 255;
  if (step == 0) return table_of([](int i) { return i; });
  int64_t n = step / 2;
  return table_of([&](int i) {
    const int64_t value = n / step;
    n += h[i];
    return value;
  });
}
}  // namespace

void autocontrast(const Pixels& p) { look_up_by_histogram(p, stretching); }
void equalize(const Pixels& p) { look_up_by_histogram(p, equalizing); }

void invert(const Pixels& p) {
  for (int64_t i = 0; i < p.bytes(); ++i) p.data[i] = static_cast<uint8_t>(255 - p.data[i]);
}

void posterize(const Pixels& p, int bits) {
  const auto mask = static_cast<uint8_t>(0xff00 >> std::clamp(bits, 0, 8));
  for (int64_t i = 0; i < p.bytes(); ++i) p.data[i] &= mask;
}

void solarize(const Pixels& p, int threshold) {
  look_up(p, table_of([&](int i) { return i < threshold ? i : 255 - i; }));
}

void solarize_add(const Pixels& p, int add, int threshold) {
  look_up(p, table_of([&](int i) { return i < threshold ? i + add : i; }));
}

namespace {
/// Pillow's Image.blend, in float.
uint8_t blend(int base, int value, float factor) {
  return static_cast<uint8_t>(std::clamp(static_cast<float>(base) + factor * static_cast<float>(value - base), 0.0f, 255.0f));
}

/// The mean of the luma, rounded.
int mean_luma(const Pixels& p) {
  int64_t sum = 0;
  for (int64_t i = 0; i < p.bytes(); i += p.channels) sum += p.channels == 3 ? luma(p.data + i) : p.data[i];
  return static_cast<int>(static_cast<double>(sum) / static_cast<double>(p.height * p.width) + 0.5);
}
}  // namespace

void brightness(const Pixels& p, float factor) {
  look_up(p, table_of([&](int i) { return blend(0, i, factor); }));
}

void contrast(const Pixels& p, float factor) {
  const int mean = mean_luma(p);
  look_up(p, table_of([&](int i) { return blend(mean, i, factor); }));
}

void color(const Pixels& p, float factor) {
  if (p.channels != 3) return;
  thread_local std::vector<uint8_t> grays;
  const int64_t row = 3 * p.width;
  grays.resize(row);
  for (int64_t y = 0; y < p.height; ++y) {  // the luma first, so that the blend has no steps of three
    const uint8_t* __restrict gray = grays.data();
    uint8_t* __restrict at = p.data + y * row;
    for (int64_t i = 0; i < row; i += 3) std::memset(grays.data() + i, luma(at + i), 3);
    for (int64_t i = 0; i < row; ++i) at[i] = blend(gray[i], at[i], factor);
  }
}

void grayscale(const Pixels& p) {
  if (p.channels != 3) return;
  for (int64_t i = 0; i < p.bytes(); i += 3) std::memset(p.data + i, luma(p.data + i), 3);
}

void sharpness(const Pixels& p, float factor) {
  thread_local std::vector<uint8_t> copy;
  copy.assign(p.data, p.data + p.bytes());
  const int64_t row = p.width * p.channels, c = p.channels;
  for (int64_t y = 1; y < p.height - 1; ++y) {
    const uint8_t *above = copy.data() + (y - 1) * row, *at = above + row, *below = at + row;
    uint8_t* __restrict to = p.data + y * row;
    for (int64_t i = c; i < row - c; ++i) {  // weights 1 1 1, 1 5 1, 1 1 1 over 13, rounded: sums of 13ths are never half-way
      const int around = above[i - c] + above[i] + above[i + c] + at[i - c] + at[i + c] + below[i - c] + below[i] + below[i + c];
      const auto smooth = static_cast<uint16_t>(2 * (around + 5 * at[i]) + 13);
      to[i] = blend(smooth / 26, at[i], factor);
    }
  }
}

}  // namespace mesa::pixels
