// What lies in a run's folder, read by someone who expects anything there.
#include <algorithm>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "mesa/base/files.h"
#include "mesa/train/report.h"

namespace mesa {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr int64_t kMostBytes = int64_t{1} << 31;  // of metrics.jsonl: some ten million lines
constexpr int64_t kMostSmallBytes = 64 << 20;     // of every other file
constexpr size_t kMostWarnings = 20;
constexpr int64_t kMostOfAnything = 1'000'000'000'000'000;  // steps, bytes: so that sums of a damaged table stay whole numbers

bool exists(const std::string& path) {
  std::error_code ignored;
  return fs::exists(path, ignored);
}

int64_t within_reason(int64_t x) { return std::clamp<int64_t>(x, 0, kMostOfAnything); }

double number(const Json& object, const char* key) {
  const auto found = object.find(key);
  return found != object.end() && found->is_number() ? found->get<double>() : kNotMeasured;
}

int64_t whole(const Json& object, const char* key) {
  const auto found = object.find(key);
  return found != object.end() && found->is_number_integer() ? within_reason(found->get<int64_t>()) : 0;
}

std::string text(const Json& object, const char* key) {
  const auto found = object.find(key);
  return found != object.end() && found->is_string() ? found->get<std::string>() : "";
}

template <class T>
bool parse(const std::string& cell, T& out) {
  const auto [end, code] = std::from_chars(cell.data(), cell.data() + cell.size(), out);
  return code == std::errc{} && end == cell.data() + cell.size();
}

/// A table by the names of its columns, whatever their order. Rows of another length are left out and counted.
class Table {
 public:
  explicit Table(const std::string& csv) : rows_(parse_csv(csv)) {
    if (rows_.empty()) return;
    for (size_t i = 0; i < rows_[0].size(); ++i) columns_[rows_[0][i]] = i;
    const size_t width = rows_[0].size();
    rows_.erase(rows_.begin());
    odd_ = std::erase_if(rows_, [&](const auto& row) { return row.size() != width; });
  }
  size_t size() const { return rows_.size(); }
  size_t odd() const { return odd_; }
  bool has(const std::string& column) const { return columns_.contains(column); }
  std::string text(size_t row, const std::string& column) const { return has(column) ? rows_[row][columns_.at(column)] : ""; }
  double number(size_t row, const std::string& column) const {
    double x = 0;
    return parse(text(row, column), x) ? x : kNotMeasured;
  }
  int64_t whole(size_t row, const std::string& column) const {
    int64_t x = 0;
    return parse(text(row, column), x) ? within_reason(x) : 0;
  }

 private:
  std::vector<std::vector<std::string>> rows_;
  std::map<std::string, size_t> columns_;
  size_t odd_ = 0;
};

class Reader {
 public:
  explicit Reader(const std::string& folder) : folder_(folder) {}

  RunRecord operator()() {
    const fs::path whole = fs::weakly_canonical((fs::absolute(folder_) / "").parent_path());
    run_.name = whole.filename().string();
    attempt("config.yaml", [&](const std::string& path) { run_.config = read_text(path, kMostSmallBytes); });
    attempt("metrics.jsonl", [&](const std::string& path) { intervals(path); });
    attempt("summary.csv", [&](const std::string& path) { epochs(Table(read_text(path, kMostSmallBytes))); });
    attempt("memory.csv", [&](const std::string& path) { memory(Table(read_text(path, kMostSmallBytes))); });
    attempt("summary.json", [&](const std::string& path) { summary(Json::parse(read_text(path, kMostSmallBytes), nullptr, false)); });
    attempt("environment.json",
            [&](const std::string& path) { environment(Json::parse(read_text(path, kMostSmallBytes), nullptr, false)); });
    attempt("samples.json", [&](const std::string& path) { run_.samples = read_pictures(path); });
    attempt("mistakes.json", [&](const std::string& path) { run_.mistakes = read_pictures(path); });
    attempt(
        "confusion.json", [&](const std::string& path) { run_.confusion = read_confusion(path); }, true);
    attempt(
        "health.csv", [&](const std::string& path) { health(Table(read_text(path, kMostSmallBytes))); }, true);
    attempt("log.txt", [&](const std::string& path) { warnings(path); });
    return std::move(run_);
  }

 private:
  template <class F>
  void attempt(const std::string& name, F&& read, bool optional = false) {
    const std::string path = folder_ + "/" + name;
    if (!exists(path)) {
      if (!optional) note(name + " is not there");
      return;
    }
    try {
      read(path);
    } catch (const std::exception& e) {
      const std::string what = e.what();
      note(what.find(name) == std::string::npos ? name + ": " + what : what.substr(what.find(name)));
    }
  }
  void note(const std::string& text) { run_.notes.push_back(text); }
  void note_odd(const char* name, size_t lines) {
    if (lines > 0) note(concat(name, ": ", lines, lines == 1 ? " line is" : " lines are", " damaged and left out"));
  }

  void intervals(const std::string& path) {
    check(fs::is_regular_file(path), path, " is not a file");
    check(static_cast<int64_t>(fs::file_size(path)) <= kMostBytes, path, " is larger than ", kMostBytes, " bytes");
    std::ifstream file(path, std::ios::binary);
    size_t odd = 0;
    for (std::string line; std::getline(file, line);) {
      const Json json = Json::parse(line, nullptr, false);
      if (!json.is_object() || !json.contains("step") || !json["step"].is_number_integer()) {
        ++odd;
        continue;
      }
      const double wait = number(json, "data_wait");
      run_.intervals.push_back({whole(json, "step"), whole(json, "epoch"), number(json, "loss"), number(json, "lr"),
                                number(json, "grad_norm"), number(json, "images_per_second"), wait,
                                number(json, "activation_bytes_per_image"), whole(json, "peak_bytes"), whole(json, "bad_steps"),
                                whole(json, "bad_samples")});
    }
    note_odd("metrics.jsonl", odd);
    std::stable_sort(run_.intervals.begin(), run_.intervals.end(), [](const auto& a, const auto& b) { return a.step < b.step; });
  }

  void epochs(const Table& table) {
    check(table.has("epoch"), "its first line names no column 'epoch'");
    for (size_t i = 0; i < table.size(); ++i) {
      const auto x = [&](const char* column) { return table.number(i, column); };
      run_.epochs.push_back({table.whole(i, "epoch"), x("train_loss"), x("eval_loss"), x("eval_top1"), x("eval_top5"), x("lr"),
                             x("images_per_second"), x("activation_bytes_per_image"), table.whole(i, "peak_bytes"), x("seconds"),
                             table.whole(i, "step")});
      if (!table.has("step")) run_.epochs.back().step = last_step_of(run_.epochs.back().epoch);
    }
    note_odd("summary.csv", table.odd());
    std::stable_sort(run_.epochs.begin(), run_.epochs.end(), [](const auto& a, const auto& b) { return a.step < b.step; });
  }

  int64_t last_step_of(int64_t epoch) const {
    int64_t step = 0;
    for (const IntervalRow& row : run_.intervals)
      if (row.epoch <= epoch) step = row.step;
    return step;
  }

  void memory(const Table& table) {
    check(table.has("site") && table.has("kept_bytes"), "its first line names no columns 'site' and 'kept_bytes'");
    for (size_t i = 0; i < table.size(); ++i)
      run_.memory.push_back({table.text(i, "site"), table.text(i, "shape"), table.text(i, "codec"), table.whole(i, "exact_bytes"),
                             table.whole(i, "kept_bytes"), table.number(i, "saturated")});
    note_odd("memory.csv", table.odd());
  }

  void health(const Table& table) {
    check(table.has("step") && table.has("site"), "its first line names no columns 'step' and 'site'");
    for (size_t i = 0; i < table.size(); ++i)
      run_.health.push_back({table.whole(i, "step"), table.text(i, "site"), table.text(i, "codec"), table.number(i, "relative_error"),
                             table.number(i, "clamped")});
    note_odd("health.csv", table.odd());
    std::stable_sort(run_.health.begin(), run_.health.end(), [](const auto& a, const auto& b) { return a.step < b.step; });
  }

  void summary(const Json& json) {
    check(json.is_object(), "is damaged");
    RunSummary& s = run_.summary;
    s.top1 = number(json, "top1"), s.top5 = number(json, "top5"), s.eval_loss = number(json, "eval_loss"),
    s.train_loss = number(json, "train_loss");
    s.epochs = whole(json, "epochs"), s.steps = whole(json, "steps"), s.parameters = whole(json, "parameters"),
    s.seed = whole(json, "seed");
    s.images_per_second = number(json, "images_per_second"), s.peak_bytes = whole(json, "peak_bytes");
    s.activation_bytes_per_image = number(json, "activation_bytes_per_image");
    s.exact_activation_bytes_per_image = number(json, "exact_activation_bytes_per_image");
    s.device = text(json, "device"), s.storage = text(json, "storage");
    run_.has_summary = true;
  }

  void environment(const Json& json) {
    check(json.is_object(), "is damaged");
    for (const auto& [key, value] : json.items())
      run_.environment.emplace_back(
          key, value.is_string() ? value.get<std::string>() : value.dump(-1, ' ', false, Json::error_handler_t::replace));
  }

  /// The last part of the log is enough.
  void warnings(const std::string& path) {
    check(fs::is_regular_file(path), path, " is not a file");
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    file.seekg(std::max<std::streamoff>(0, static_cast<std::streamoff>(file.tellg()) - (1 << 20)));
    for (std::string line; std::getline(file, line);) {
      const size_t at = line.find("[warning] ");
      if (at != std::string::npos) run_.warnings.push_back(line.substr(at + 10));
    }
    if (run_.warnings.size() > kMostWarnings) run_.warnings.erase(run_.warnings.begin(), run_.warnings.end() - kMostWarnings);
  }

  std::string folder_;
  RunRecord run_;
};

}  // namespace

RunRecord read_run(const std::string& folder) {
  if (!exists(folder)) throw Error(folder + " does not exist");
  const bool run = exists(folder + "/config.yaml") || exists(folder + "/metrics.jsonl") || exists(folder + "/summary.csv");
  if (!run) throw Error(folder + " is not a run's folder: it has no config.yaml, metrics.jsonl or summary.csv");
  return Reader(folder)();
}

}  // namespace mesa
