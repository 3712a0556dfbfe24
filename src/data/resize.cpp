#include "mesa/data/resize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "mesa/base/error.h"
#include "weighted_rows.h"

namespace mesa {

Interpolation parse_interpolation(const std::string& text, const std::string& key) {
  if (text == "bilinear") return Interpolation::bilinear;
  check(text == "bicubic", key, " must be bilinear or bicubic, it is '", text, "'");
  return Interpolation::bicubic;
}

namespace {
double triangle(double x) { return std::max(0.0, 1 - std::fabs(x)); }

double cubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

/// For each output position the first input position and `taps` weights (zero where there are fewer).
struct Weights {
  int64_t taps = 0;
  std::vector<int32_t> first, weight;

  /// Outputs from..from+count-1 of a row of `in` elements resized to `out`.
  void compute(int64_t in, int64_t out, int64_t from, int64_t count, Interpolation interpolation) {
    const double scale = static_cast<double>(in) / static_cast<double>(out), stretch = std::max(scale, 1.0);
    const double support = (interpolation == Interpolation::bicubic ? 2.0 : 1.0) * stretch;
    taps = std::min(static_cast<int64_t>(std::ceil(support)) * 2 + 1, in);
    first.resize(count);
    weight.assign(count * taps, 0);
    exact_.resize(taps);
    for (int64_t i = 0; i < count; ++i) {
      const double center = (static_cast<double>(from + i) + 0.5) * scale;
      const int64_t low = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
      const int64_t n = std::min(static_cast<int64_t>(center + support + 0.5), in) - low;
      double sum = 0;
      for (int64_t k = 0; k < n; ++k) {
        const double at = (static_cast<double>(k + low) - center + 0.5) / stretch;
        exact_[k] = interpolation == Interpolation::bicubic ? cubic(at) : triangle(at);
        sum += exact_[k];
      }
      first[i] = static_cast<int32_t>(low);
      for (int64_t k = 0; k < n; ++k) {
        const double w = exact_[k] / sum;
        weight[i * taps + k] = static_cast<int32_t>(w * (1 << kWeightBits) + (w < 0 ? -0.5 : 0.5));
      }
      if (low + taps > in) shift_left(i, in);
    }
  }

 private:
  /// Keeps first + taps inside the row, so that the inner loops need no bound of their own.
  void shift_left(int64_t i, int64_t in) {
    const int64_t by = first[i] + taps - in;
    int32_t* w = weight.data() + i * taps;
    std::copy_backward(w, w + taps - by, w + taps);
    std::fill(w, w + by, 0);
    first[i] -= static_cast<int32_t>(by);
  }
  std::vector<double> exact_;
};

/// Scratch memory of one thread, kept between pictures.
struct Workspace {
  Weights columns, rows;
  std::vector<uint8_t> narrow;        // the rows that are needed, resized horizontally
  std::vector<uint8_t> turned, thin;  // kBand rows with the columns as rows, before and after it
};

/// The columns or rows that a pass reads.
struct Span {
  int64_t first, count;
  explicit Span(const Weights& weights) {
    const auto [lowest, highest] = std::minmax_element(weights.first.begin(), weights.first.end());
    first = *lowest, count = *highest + weights.taps - first;
  }
};

/// Resizes `rows` rows from `in` on to `width` pixels each, in work.narrow. Bands of rows are turned by 90 degrees, so that this pass too
/// adds up rows.
void resize_columns(const uint8_t* in, int64_t stride, int64_t channels, int64_t rows, int64_t width, Workspace& work) {
  constexpr int64_t kBand = 64;
  const Span columns(work.columns);
  const int64_t row_bytes = width * channels, taps = work.columns.taps;
  work.turned.resize(columns.count * channels * kBand);
  work.thin.resize(row_bytes * kBand);
  for (int64_t y = 0; y < rows; y += kBand) {
    const int64_t band = std::min(kBand, rows - y);  // where it is narrower, what lies beside it is computed, too, and not used
    transpose_bytes(in + y * stride + columns.first * channels, stride, band, columns.count * channels, work.turned.data(), kBand);
    for (int64_t x = 0; x < width; ++x)
      weighted_rows(work.turned.data() + (work.columns.first[x] - columns.first) * channels * kBand, channels * kBand,
                    work.columns.weight.data() + x * taps, taps, channels * kBand, work.thin.data() + x * channels * kBand);
    transpose_bytes(work.thin.data(), kBand, row_bytes, band, work.narrow.data() + y * row_bytes, row_bytes);
  }
}
}  // namespace

void resize(const Image& image, const Box& crop, int64_t height, int64_t width, const Box& window, Interpolation interpolation,
            uint8_t* out) {
  check(crop.height > 0 && crop.width > 0 && crop.y >= 0 && crop.x >= 0 && crop.height <= image.height - crop.y &&
            crop.width <= image.width - crop.x,
        "a crop of ", crop.height, " x ", crop.width, " at ", crop.y, ", ", crop.x, " of ", image.height, " x ", image.width, " pixels");
  check(window.height > 0 && window.width > 0 && window.y >= 0 && window.x >= 0 && window.height <= height - window.y &&
            window.width <= width - window.x,
        "a window of ", window.height, " x ", window.width, " at ", window.y, ", ", window.x, " of ", height, " x ", width, " pixels");
  check(image.channels == 1 || image.channels == 3, "pictures have 1 or 3 channels, not ", image.channels);
  thread_local Workspace work;
  work.columns.compute(crop.width, width, window.x, window.width, interpolation);
  work.rows.compute(crop.height, height, window.y, window.height, interpolation);
  const Span rows(work.rows);
  const int64_t row_bytes = window.width * image.channels, stride = int64_t{image.width} * image.channels;
  work.narrow.resize(rows.count * row_bytes);
  const uint8_t* corner = image.pixels.data() + (crop.y + rows.first) * stride + crop.x * image.channels;
  if (crop.width == width)
    for (int64_t y = 0; y < rows.count; ++y)
      std::memcpy(work.narrow.data() + y * row_bytes, corner + y * stride + window.x * image.channels, row_bytes);
  else
    resize_columns(corner, stride, image.channels, rows.count, window.width, work);
  for (int64_t y = 0; y < window.height; ++y)
    weighted_rows(work.narrow.data() + (work.rows.first[y] - rows.first) * row_bytes, row_bytes,
                  work.rows.weight.data() + y * work.rows.taps, work.rows.taps, row_bytes, out + y * row_bytes);
}

}  // namespace mesa
