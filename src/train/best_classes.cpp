#include "mesa/train/best_classes.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "mesa/train/metrics.h"

namespace mesa {
namespace {

/// The best classes of a row of logits, the best first.
std::vector<int64_t> best_of(const float* row, int64_t classes, int64_t most) {
  std::vector<int64_t> order(static_cast<size_t>(classes));
  std::iota(order.begin(), order.end(), 0);
  std::erase_if(order, [&](int64_t c) { return std::isnan(row[c]); });
  const auto end = order.begin() + std::min<int64_t>(most, static_cast<int64_t>(order.size()));
  std::partial_sort(order.begin(), end, order.end(), [&](int64_t a, int64_t b) { return row[a] != row[b] ? row[a] > row[b] : a < b; });
  order.erase(end, order.end());
  return order;
}

}  // namespace

BestClasses::BestClasses(int64_t pictures, int64_t classes)
    : classes_(classes), best_(std::min(kMost, classes)), notes_(static_cast<size_t>(pictures * (1 + 2 * best_))) {}

void BestClasses::take(const Batch& batch, const Tensor& logits) {
  check(logits.dim(1) == classes_, "logits of ", logits.dim(1), " classes in place of ", classes_);
  for (int64_t b = 0; b < logits.dim(0); ++b) {
    const float* row = logits.data<float>() + b * classes_;
    const int64_t picture = batch.sample_indices.at(static_cast<size_t>(b)), at = picture * (1 + 2 * best_);
    check(at + 2 * best_ < static_cast<int64_t>(notes_.size()), "picture ", picture, " of a smaller test set");
    double* note = notes_.data() + at;
    *note++ = 1 + static_cast<double>(batch.labels.data<int64_t>()[b]);
    const std::vector<int64_t> best = best_of(row, classes_, best_);
    double sum = 0;
    for (int64_t c = 0; c < classes_; ++c)
      if (!std::isnan(row[c])) sum += std::exp(static_cast<double>(row[c]) - row[best[0]]);
    for (const int64_t c : best) *note++ = 1 + static_cast<double>(c), *note++ = std::exp(static_cast<double>(row[c]) - row[best[0]]) / sum;
  }
}

void BestClasses::finish(const AddUp& add_up) {
  if (add_up) add_up(notes_);
}

std::string BestClasses::csv(const Dataset& test, const std::vector<std::string>& names) const {
  const auto cells = [&](double note) {  // number,name
    const auto c = static_cast<size_t>(std::llround(note) - 1);
    return concat(c, ",", csv_cell(c < names.size() ? names[c] : std::to_string(c)));
  };
  std::string out = "picture,truth,truth_name";
  for (int64_t k = 1; k <= best_; ++k) out += concat(",top", k, ",top", k, "_name,top", k, "_probability");
  out += "\n";
  for (int64_t i = 0; i < test.size(); ++i) {
    const double* note = notes_.data() + i * (1 + 2 * best_);
    if (*note == 0) continue;
    out += concat(csv_cell(test.describe(i)), ",", cells(*note));
    for (int64_t k = 0; k < best_; ++k) {
      const double c = note[1 + 2 * k], probability = note[2 + 2 * k];
      out += c == 0 ? std::string(",,,") : concat(",", cells(c), ",", csv_cell(probability));
    }
    out += "\n";
  }
  return out;
}

}  // namespace mesa
