#include "mesa/train/confusion.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "mesa/base/files.h"
#include "mesa/train/metrics.h"

namespace mesa {
namespace {

using nlohmann::ordered_json;

constexpr int64_t kMostBytes = 256 << 20;    // of a file
constexpr int64_t kMostClasses = 1'000'000;  // model.classes allows no more
constexpr int64_t kMostImages = 1'000'000'000'000;

double percent(int64_t part, int64_t whole) {
  return whole > 0 ? 100.0 * static_cast<double>(part) / static_cast<double>(whole) : std::nan("");
}

int64_t whole(const ordered_json& json, const char* what) {
  check(json.is_number_integer(), what, " is no whole number");
  return json.get<int64_t>();
}

/// The first of the highest logits, as count_top decides; -1 if all are NaN.
int64_t best_of(const float* row, int64_t classes) {
  int64_t best = -1;
  for (int64_t c = 0; c < classes; ++c)
    if (!std::isnan(row[c]) && (best < 0 || row[c] > row[best])) best = c;
  return best;
}

}  // namespace

double ClassRow::top1() const { return percent(hits, images); }
double ClassRow::top5() const { return percent(hits5, images); }
double ClassRow::precision() const { return percent(hits, predicted); }

Confusion::Confusion(int64_t classes, std::vector<std::string> names) : hits5_(static_cast<size_t>(classes)), names_(std::move(names)) {}

void Confusion::add(const ConfusionCell& cell) {
  check(cell.truth >= 0 && cell.truth < classes() && cell.predicted >= -1 && cell.predicted < classes(), "class ", cell.truth,
        " taken for ", cell.predicted, " where there are ", classes(), " classes");
  check(cell.images >= 0 && cell.images <= kMostImages - images_, cell.images, " images of class ", cell.truth);
  images_ += cell.images;
  if (cell.images > 0) cells_[{cell.truth, cell.predicted}] += cell.images;
}

void Confusion::add_hits5(int64_t truth, int64_t images) {
  check(truth >= 0 && truth < classes() && images >= 0 && images <= kMostImages, images, " images of class ", truth);
  hits5_[static_cast<size_t>(truth)] += images;
}

std::string Confusion::name(int64_t label) const {
  return label >= 0 && label < static_cast<int64_t>(names_.size()) ? names_[static_cast<size_t>(label)] : std::to_string(label);
}

std::vector<ConfusionCell> Confusion::cells() const {
  std::vector<ConfusionCell> out;
  for (const auto& [pair, images] : cells_) out.push_back({pair.first, pair.second, images});
  return out;
}

std::vector<ClassRow> Confusion::rows() const {
  std::vector<ClassRow> rows(hits5_.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i].label = static_cast<int64_t>(i), rows[i].name = name(rows[i].label);
    rows[i].hits5 = hits5_[i];
  }
  for (const ConfusionCell& cell : cells()) {
    ClassRow& row = rows[static_cast<size_t>(cell.truth)];
    row.images += cell.images;
    if (cell.predicted >= 0) rows[static_cast<size_t>(cell.predicted)].predicted += cell.images;
    if (cell.predicted == cell.truth)
      row.hits = cell.images;
    else if (cell.predicted >= 0 && cell.images > row.confused)
      row.confused_with = cell.predicted, row.confused = cell.images;
  }
  return rows;
}

std::vector<ConfusionCell> Confusion::most_confused(size_t most) const {
  std::vector<ConfusionCell> wrong = cells();
  std::erase_if(wrong, [](const ConfusionCell& cell) { return cell.predicted == cell.truth || cell.predicted < 0; });
  std::stable_sort(wrong.begin(), wrong.end(), [](const auto& a, const auto& b) { return a.images > b.images; });
  if (wrong.size() > most) wrong.resize(most);
  return wrong;
}

double Confusion::mean_top1() const {
  double sum = 0, count = 0;
  for (const ClassRow& row : rows())
    if (row.images > 0) sum += row.top1(), ++count;
  return count > 0 ? sum / count : std::nan("");
}

Predictions::Predictions(int64_t pictures, int64_t classes, std::vector<std::string> names)
    : classes_(classes), names_(std::move(names)), notes_(static_cast<size_t>(pictures)) {
  check(classes > 0 && classes <= kMostClasses, classes, " classes");  // so that a note is exact
}

// A note is 0 of a picture that is left out or another rank's, else 1 + 2 (label (K + 1) + prediction + 1) + (among the best five).
void Predictions::take(const Batch& batch, const Tensor& logits) {
  check(logits.dim(1) == classes_, "logits of ", logits.dim(1), " classes in place of ", classes_);
  for (int64_t b = 0; b < logits.dim(0); ++b) {
    const float* row = logits.data<float>() + b * classes_;
    const int64_t label = batch.labels.data<int64_t>()[b], best = best_of(row, classes_);
    const int64_t pair = label * (classes_ + 1) + best + 1;
    notes_.at(static_cast<size_t>(batch.sample_indices.at(static_cast<size_t>(b)))) =
        static_cast<double>(1 + 2 * pair + (is_among_best(row, classes_, label, 5) ? 1 : 0));
  }
}

Confusion Predictions::finish(const AddUp& add_up) {
  if (add_up) add_up(notes_);
  Confusion out(classes_, names_);
  for (double& note : notes_) {
    const int64_t code = std::llround(note) - 1;
    note = 0;
    if (code < 0) continue;
    const int64_t truth = code / 2 / (classes_ + 1);
    out.add({truth, code / 2 % (classes_ + 1) - 1, 1});
    out.add_hits5(truth, code % 2);
  }
  return out;
}

std::string classes_csv(const Confusion& confusion) {
  std::string out = "class,name,images,top1,top5,precision,predicted,confused_with,confused_with_name,confused\n";
  for (const ClassRow& r : confusion.rows()) {
    const bool wrong = r.confused_with >= 0;
    out += concat(r.label, ",", csv_cell(r.name), ",", r.images, ",", csv_cell(r.top1()), ",", csv_cell(r.top5()), ",", csv_cell(r.precision()),
                  ",", r.predicted, ",", wrong ? std::to_string(r.confused_with) : "", ",",
                  wrong ? csv_cell(confusion.name(r.confused_with)) : "", ",", r.confused, "\n");
  }
  return out;
}

std::string confusion_csv(const Confusion& confusion) {
  std::string out = "truth,truth_name,predicted,predicted_name,images\n";
  for (const ConfusionCell& c : confusion.cells())
    out += concat(c.truth, ",", csv_cell(confusion.name(c.truth)), ",", c.predicted, ",",
                  c.predicted < 0 ? "" : csv_cell(confusion.name(c.predicted)), ",", c.images, "\n");
  return out;
}

std::string confusion_json(const Confusion& confusion, int64_t epoch) {
  ordered_json names = ordered_json::array(), top5 = ordered_json::array(), cells = ordered_json::array();
  for (const ClassRow& row : confusion.rows()) names.push_back(row.name), top5.push_back(row.hits5);
  for (const ConfusionCell& c : confusion.cells()) cells.push_back({c.truth, c.predicted, c.images});
  const ordered_json json{{"epoch", epoch}, {"classes", names}, {"top5", top5}, {"cells", cells}};
  return json.dump(-1, ' ', false, ordered_json::error_handler_t::replace) + "\n";
}

Confusion read_confusion(const std::string& path) try {
  const ordered_json json = ordered_json::parse(read_text(path, kMostBytes), nullptr, false);
  for (const char* key : {"classes", "top5", "cells"})
    check(json.is_object() && json.contains(key) && json[key].is_array(), "'", key, "' is no list");
  check(json["classes"].size() == json["top5"].size() && json["classes"].size() <= kMostClasses, json["classes"].size(), " classes");
  std::vector<std::string> names;
  for (const auto& name : json["classes"]) {
    check(name.is_string(), "the name of class ", names.size(), " is no text");
    names.push_back(name.get<std::string>());
  }
  Confusion out(static_cast<int64_t>(names.size()), names);
  for (size_t i = 0; i < names.size(); ++i) out.add_hits5(static_cast<int64_t>(i), whole(json["top5"][i], "a number of hits"));
  for (const auto& cell : json["cells"]) {
    check(cell.is_array() && cell.size() == 3, "a cell is no list of three");
    out.add({whole(cell[0], "a class"), whole(cell[1], "a class"), whole(cell[2], "a number of images")});
  }
  return out;
} catch (const Error& e) {
  const std::string what = e.what();
  throw Error(what.find(path) == std::string::npos ? path + ": " + what : what);
}

}  // namespace mesa
