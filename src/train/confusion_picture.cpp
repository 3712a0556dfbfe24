// The picture of a confusion, drawn pixel by pixel: the numbers are of a font of 3 x 5 points.
#include <algorithm>
#include <array>
#include <cmath>
#include <string_view>

#include "mesa/train/confusion.h"

namespace mesa {
namespace {

using Rgb = std::array<uint8_t, 3>;

constexpr int kMostCells = 1000;    // of a side
constexpr int kPlotSide = 800;      // pixels, about
constexpr int kLargestCell = 44;    // pixels
constexpr int kNumberedCells = 20;  // of a side: up to so many have their percentage in them
constexpr int kDot = 2;             // pixels of a point of the font
constexpr int kAdvance = 4 * kDot, kLineHeight = 5 * kDot;
constexpr int kGap = 6, kBarWidth = 14;
constexpr Rgb kInk{40, 44, 52}, kRule{150, 156, 164}, kNothing{225, 228, 232}, kPaper{255, 255, 255};

struct Glyph {
  char letter;
  std::array<uint8_t, 5> rows;  // from the top, the left point is 4
};
constexpr Glyph kFont[] = {{'0', {7, 5, 5, 5, 7}}, {'1', {2, 6, 2, 2, 7}}, {'2', {7, 1, 7, 4, 7}}, {'3', {7, 1, 7, 1, 7}},
                           {'4', {5, 5, 7, 1, 1}}, {'5', {7, 4, 7, 1, 7}}, {'6', {7, 4, 7, 5, 7}}, {'7', {7, 1, 1, 2, 2}},
                           {'8', {7, 5, 7, 5, 7}}, {'9', {7, 5, 7, 1, 7}}, {'%', {5, 1, 2, 4, 5}}, {'t', {2, 7, 2, 2, 3}},
                           {'r', {0, 7, 4, 4, 4}}, {'u', {0, 5, 5, 5, 7}}, {'h', {4, 4, 7, 5, 5}}, {'p', {0, 7, 5, 7, 4}},
                           {'e', {7, 5, 7, 4, 7}}, {'d', {1, 1, 7, 5, 7}}, {'i', {2, 0, 2, 2, 2}}, {'c', {0, 7, 4, 4, 7}}};

int width_of(std::string_view text) { return static_cast<int>(text.size()) * kAdvance - kDot; }

class Canvas {
 public:
  Canvas(int height, int width) : image_{height, width, 3, std::vector<uint8_t>(static_cast<size_t>(height) * width * 3, 255)} {}
  void fill(int y, int x, int height, int width, const Rgb& color) {
    for (int row = std::max(y, 0); row < std::min(y + height, image_.height); ++row)
      for (int column = std::max(x, 0); column < std::min(x + width, image_.width); ++column)
        std::copy(color.begin(), color.end(), image_.pixels.begin() + (static_cast<int64_t>(row) * image_.width + column) * 3);
  }
  void write(int y, int x, std::string_view text, const Rgb& color) {
    for (const char letter : text) {
      const auto* glyph = std::find_if(std::begin(kFont), std::end(kFont), [&](const Glyph& g) { return g.letter == letter; });
      if (glyph != std::end(kFont))
        for (int row = 0; row < 5; ++row)
          for (int column = 0; column < 3; ++column)
            if (glyph->rows[static_cast<size_t>(row)] >> (2 - column) & 1) fill(y + row * kDot, x + column * kDot, kDot, kDot, color);
      x += kAdvance;
    }
  }
  Image take() { return std::move(image_); }

 private:
  Image image_;
};

/// White over blue to dark blue, by the root of the share.
Rgb shade(double share) {
  constexpr Rgb kMiddle{66, 146, 198}, kDark{8, 38, 94};
  const double t = std::sqrt(std::clamp(share, 0.0, 1.0));
  const Rgb &a = t < 0.5 ? kPaper : kMiddle, &b = t < 0.5 ? kMiddle : kDark;
  const double part = t < 0.5 ? 2 * t : 2 * t - 1;
  Rgb out;
  for (size_t c = 0; c < 3; ++c) out[c] = static_cast<uint8_t>(std::lround(a[c] + part * (b[c] - a[c])));
  return out;
}

/// Shares of the cells, rows of `side`; a row without images is NaN.
std::vector<double> shares_of(const Confusion& confusion, int64_t classes_a_cell, int64_t side) {
  std::vector<double> shares(static_cast<size_t>(side * side)), images(static_cast<size_t>(side));
  for (const ConfusionCell& cell : confusion.cells()) {
    const int64_t row = cell.truth / classes_a_cell;
    images[static_cast<size_t>(row)] += static_cast<double>(cell.images);
    if (cell.predicted >= 0) shares[static_cast<size_t>(row * side + cell.predicted / classes_a_cell)] += static_cast<double>(cell.images);
  }
  for (int64_t i = 0; i < side * side; ++i) shares[static_cast<size_t>(i)] /= images[static_cast<size_t>(i / side)];  // 0 / 0 is NaN
  return shares;
}

/// Cells between two numbers of an axis, so that they do not touch: 1, 2, 5, 10, ...
int64_t tick_distance(int64_t cell, int label_width) {
  for (int64_t ten = 1;; ten *= 10)
    for (const int64_t step : {ten, 2 * ten, 5 * ten})
      if (step * cell >= label_width + kGap) return step;
}

}  // namespace

Image draw_confusion(const Confusion& confusion) {
  const int64_t classes = std::max<int64_t>(confusion.classes(), 1), together = (classes + kMostCells - 1) / kMostCells;
  const int side = static_cast<int>((classes + together - 1) / together), cell = std::clamp(kPlotSide / side, 1, kLargestCell);
  const int label_width = width_of(std::to_string(classes - 1)), plot = side * cell;
  const int left = std::max(label_width, width_of("truth")) + 2 * kGap, top = 2 * kLineHeight + 3 * kGap;
  const int bar = left + plot + 3 * kGap, height = top + std::max(plot, 8 * kLineHeight) + 2 * kGap;
  Canvas canvas(height, bar + kBarWidth + kGap + width_of("100%") + kGap);
  canvas.write(top - kGap - kLineHeight, kGap, "truth", kInk);
  canvas.write(kGap, left, "predicted", kInk);

  canvas.fill(top - 1, left - 1, plot + 2, plot + 2, kRule);
  const std::vector<double> shares = shares_of(confusion, together, side);
  for (int row = 0; row < side; ++row)
    for (int column = 0; column < side; ++column) {
      const double share = shares[static_cast<size_t>(row) * side + column];
      const int y = top + row * cell, x = left + column * cell;
      canvas.fill(y, x, cell, cell, std::isnan(share) ? kNothing : shade(share));
      if (side > kNumberedCells || !(share >= 0.005)) continue;
      const std::string text = std::to_string(std::lround(100 * share));
      canvas.write(y + (cell - kLineHeight) / 2, x + (cell - width_of(text)) / 2, text, share > 0.2 ? kPaper : kInk);
    }
  const int64_t across = tick_distance(cell, label_width), down = tick_distance(cell, kLineHeight);
  for (int64_t i = 0; i < side; i += across) {
    const std::string text = std::to_string(i * together);
    canvas.write(top - kGap - kLineHeight, left + static_cast<int>(i * cell) + (cell - width_of(text)) / 2, text, kInk);
  }
  for (int64_t i = down == 1 ? 0 : down; i < side; i += down) {
    const std::string text = std::to_string(i * together);
    canvas.write(top + static_cast<int>(i * cell) + (cell - kLineHeight) / 2, left - kGap - width_of(text), text, kInk);
  }

  const int length = std::max(plot, 8 * kLineHeight) - 1;
  for (int y = 0; y <= length; ++y) canvas.fill(top + y, bar, 1, kBarWidth, shade(std::pow(1 - static_cast<double>(y) / length, 2)));
  for (const int percent : {0, 1, 10, 25, 50, 100}) {
    const int y = top + static_cast<int>(std::lround((1 - std::sqrt(percent / 100.0)) * length));
    canvas.fill(y, bar + kBarWidth, 1, 3, kInk);
    canvas.write(std::min(y - kLineHeight / 2, top + length - kLineHeight + kLineHeight / 2), bar + kBarWidth + kGap,
                 std::to_string(percent) + "%", kInk);
  }
  return canvas.take();
}

}  // namespace mesa
