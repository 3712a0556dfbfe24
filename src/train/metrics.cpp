#include "mesa/train/metrics.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "mesa/base/files.h"
#include "mesa/tensor/memory.h"

namespace mesa {
namespace {

using nlohmann::ordered_json;

constexpr const char* kEpochHeader =
    "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr,images_per_second,activation_bytes_per_image,peak_bytes,seconds,step,"
    "eval_loss_ema,eval_top1_ema,eval_top5_ema";
constexpr const char* kHealthHeader = "step,site,codec,relative_error,clamped";
constexpr const char *kEpochTable = "summary.csv", *kHealthTable = "health.csv";
constexpr double kRedrawSeconds = 0.1;

ordered_json number(double x) { return std::isfinite(x) ? ordered_json(x) : ordered_json(nullptr); }

// Calls f for each complete line; a torn last one (the run died while writing) is left out.
template <class F>
void for_each_line(const std::string& text, F&& f) {
  for (size_t from = 0;;) {
    const size_t end = text.find('\n', from);
    if (end == std::string::npos) return;
    f(text.substr(from, end - from));
    from = end + 1;
  }
}

/// The cells that a table of the first columns alone lacks, as text; nothing if it is none.
std::optional<std::string> missing_cells(const std::string& header, const std::string& all) {
  if (header != all && (header.find(",seconds") == std::string::npos || !all.starts_with(header + ","))) return {};
  return std::string(static_cast<size_t>(std::count(all.begin() + static_cast<std::ptrdiff_t>(header.size()), all.end(), ',')), ',');
}

/// Rows of a table whose first column, an epoch or a step, is at most `last`.
std::string kept_rows(const std::string& path, const char* table, const std::string& header, int64_t last) {
  std::string kept = header + "\n";
  if (!std::filesystem::exists(path)) return kept;
  bool first = true;
  std::optional<std::string> missing;
  for_each_line(read_text(path), [&](const std::string& line) {
    if (first) missing = missing_cells(line, header);
    if (!missing) throw Error(concat(path, ": its first line is not that of a ", table, "; move the file away"));
    int64_t number = 0;
    const auto [end, code] = std::from_chars(line.data(), line.data() + line.size(), number);
    if (!first && code == std::errc{} && end != line.data() + line.size() && *end == ',' && number <= last) kept += line + *missing + "\n";
    first = false;
  });
  return kept;
}

std::string kept_lines(const std::string& path, int64_t last_step) {
  std::string kept;
  if (!std::filesystem::exists(path)) return kept;
  for_each_line(read_text(path), [&](const std::string& line) {
    const auto json = nlohmann::json::parse(line, nullptr, false);
    if (json.is_object() && json.contains("step") && json["step"].is_number_integer() && json["step"].get<int64_t>() <= last_step)
      kept += line + "\n";
  });
  return kept;
}

// Rewrites the file as `content` and returns its path, for a member that then appends.
const std::string& restart(const std::string& path, const std::string& content) {
  write_file_atomically(path, content);
  return path;
}

double monotonic_seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

template <class... Args>
std::string text_of(const char* format, Args... args) {
  char text[128];
  std::snprintf(text, sizeof text, format, args...);
  return text;
}

}  // namespace

int terminal_width(int fd) {
  winsize size{};
  if (ioctl(fd, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) return size.ws_col;
  const char* columns = std::getenv("COLUMNS");
  const int width = columns ? std::atoi(columns) : 0;
  return width > 0 ? width : 80;
}

std::string format_bar(double done, int width) {
  std::string out(width, ' ');
  const int full = static_cast<int>(std::lround(std::clamp(done, 0.0, 1.0) * width));
  for (int i = 0; i < full; ++i) out[i] = i + 1 == full && full < width ? '>' : '=';
  return "[" + out + "]";
}

EpochLog::EpochLog(const std::string& path, std::optional<int64_t> last_epoch)
    : file_(restart(path, last_epoch ? kept_rows(path, kEpochTable, kEpochHeader, *last_epoch) : std::string(kEpochHeader) + "\n"),
            OutputFile::Mode::append) {}

void EpochLog::append(const EpochRow& r) {
  file_.write(concat(r.epoch, ",", csv_cell(r.train_loss), ",", csv_cell(r.eval_loss), ",", csv_cell(r.eval_top1), ",",
                     csv_cell(r.eval_top5), ",", csv_cell(r.lr), ",", csv_cell(r.images_per_second), ",",
                     csv_cell(r.activation_bytes_per_image), ",", r.peak_bytes, ",", csv_cell(r.seconds), ",", r.step, ",",
                     csv_cell(r.eval_loss_ema), ",", csv_cell(r.eval_top1_ema), ",", csv_cell(r.eval_top5_ema), "\n"));
  file_.flush();
}

IntervalLog::IntervalLog(const std::string& path, std::optional<int64_t> last_step)
    : file_(restart(path, last_step ? kept_lines(path, *last_step) : ""), OutputFile::Mode::append) {}

void IntervalLog::append(const IntervalRow& r) {
  ordered_json line = {{"step", r.step},
                       {"epoch", r.epoch},
                       {"loss", number(r.loss)},
                       {"lr", number(r.lr)},
                       {"grad_norm", number(r.grad_norm)},
                       {"images_per_second", number(r.images_per_second)},
                       {"data_wait", number(r.data_wait)},
                       {"data_read", number(r.data_read)},
                       {"data_decode", number(r.data_decode)},
                       {"data_augment", number(r.data_augment)},
                       {"activation_bytes_per_image", number(r.activation_bytes_per_image)},
                       {"peak_bytes", r.peak_bytes},
                       {"bad_steps", r.bad_steps},
                       {"bad_samples", r.bad_samples},
                       {"checkpoint_step", r.checkpoint_step < 0 ? ordered_json(nullptr) : ordered_json(r.checkpoint_step)},
                       {"checkpoint_writing", number(r.checkpoint_writing)}};
  if (!r.rank_seconds.empty()) {
    line["sync_wait"] = number(r.sync_wait), line["rank_seconds"] = r.rank_seconds;
    line["slowest_rank"] = r.slowest.rank, line["slowest_ratio"] = number(r.slowest.ratio);
  }
  file_.write(line.dump() + "\n");
  file_.flush();
}

HealthLog::HealthLog(const std::string& path, std::optional<int64_t> last_step)
    : file_(restart(path, last_step ? kept_rows(path, kHealthTable, kHealthHeader, *last_step) : std::string(kHealthHeader) + "\n"),
            OutputFile::Mode::append) {}

void HealthLog::append(std::span<const HealthRow> rows) {
  for (const HealthRow& r : rows)
    file_.write(
        concat(r.step, ",", csv_cell(r.site), ",", csv_cell(r.codec), ",", csv_cell(r.relative_error), ",", csv_cell(r.clamped), "\n"));
  file_.flush();
}

std::string csv_cell(double x) {
  if (std::isnan(x)) return "";
  std::array<char, 32> text;
  return {text.data(), std::to_chars(text.data(), text.data() + text.size(), x).ptr};
}

std::string csv_cell(const std::string& text) {
  if (text.find_first_of(",\"\n\r") == std::string::npos) return text;
  std::string out = "\"";
  for (char c : text) out += c == '"' ? "\"\"" : std::string(1, c);
  return out + "\"";
}

std::vector<std::vector<std::string>> parse_csv(const std::string& text) {
  std::vector<std::vector<std::string>> rows;
  std::vector<std::string> row{""};
  bool quoted = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (quoted) {
      const bool doubled = c == '"' && i + 1 < text.size() && text[i + 1] == '"';
      if (c != '"' || doubled) row.back() += c;
      if (doubled) ++i;
      quoted = c != '"' || doubled;
    } else if (c == '"') {
      quoted = true;
    } else if (c == ',') {
      row.emplace_back();
    } else if (c == '\n') {
      rows.push_back(std::exchange(row, {""}));
    } else if (c != '\r') {
      row.back() += c;
    }
  }
  return rows;
}

void write_memory_csv(const std::string& path, std::span<const MemoryRow> rows) {
  std::string text = "site,shape,codec,exact_bytes,kept_bytes,saturated\n";
  for (const MemoryRow& r : rows)
    text += concat(csv_cell(r.site), ",", csv_cell(r.shape), ",", csv_cell(r.codec), ",", r.exact_bytes, ",", r.kept_bytes, ",",
                   csv_cell(r.saturated), "\n");
  write_file_atomically(path, text);
}

void write_summary_json(const std::string& path, const RunSummary& s) {
  const ordered_json json = {{"top1", number(s.top1)},
                             {"top5", number(s.top5)},
                             {"eval_loss", number(s.eval_loss)},
                             {"train_loss", number(s.train_loss)},
                             {"top1_ema", number(s.top1_ema)},
                             {"top5_ema", number(s.top5_ema)},
                             {"eval_loss_ema", number(s.eval_loss_ema)},
                             {"epochs", s.epochs},
                             {"steps", s.steps},
                             {"images_per_second", number(s.images_per_second)},
                             {"parameters", s.parameters},
                             {"activation_bytes_per_image", number(s.activation_bytes_per_image)},
                             {"exact_activation_bytes_per_image", number(s.exact_activation_bytes_per_image)},
                             {"peak_bytes", s.peak_bytes},
                             {"device", s.device},
                             {"storage", s.storage},
                             {"seed", s.seed}};
  write_file_atomically(path, json.dump(2, ' ', false, ordered_json::error_handler_t::replace) + "\n");
}

std::optional<double> WaitWatch::add(double seconds, double wait) {
  constexpr double kJudgedSeconds = 10, kTooMuch = 0.1;
  seconds_ += seconds, wait_ += wait;
  if (seconds_ < kJudgedSeconds) return {};
  const double share = std::min(1.0, wait_ / seconds_);
  seconds_ = wait_ = 0;
  return share > kTooMuch ? std::optional(share) : std::nullopt;
}

Slowest slowest_of(const std::vector<double>& rank_seconds) {
  std::vector<double> sorted = rank_seconds;
  std::sort(sorted.begin(), sorted.end());
  const double median = sorted.at((sorted.size() - 1) / 2);
  const auto slowest = std::max_element(rank_seconds.begin(), rank_seconds.end());
  return {slowest - rank_seconds.begin(), median > 0 ? *slowest / median : 1};
}

std::optional<Slowest> StragglerWatch::add(const std::vector<double>& rank_seconds, int64_t updates) {
  constexpr int64_t kJudgedUpdates = 50;
  constexpr double kTooSlow = 1.5;
  seconds_.resize(rank_seconds.size());
  for (size_t r = 0; r < rank_seconds.size(); ++r) seconds_[r] += rank_seconds[r] * static_cast<double>(updates);
  updates_ += updates;
  if (updates_ < kJudgedUpdates) return {};
  const Slowest slowest = slowest_of(seconds_);
  seconds_.clear();
  updates_ = 0;
  return slowest.ratio > kTooSlow ? std::optional(slowest) : std::nullopt;
}

std::string format_duration(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0 || seconds > 1e9) return "-:--";
  const auto s = static_cast<long>(std::lround(seconds));
  return s >= 3600 ? text_of("%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60) : text_of("%ld:%02ld", s / 60, s % 60);
}

std::string format_progress(const ProgressState& s, int width) {
  const double done = s.steps > 0 ? static_cast<double>(s.step) / static_cast<double>(s.steps) : 0;
  // In the order of the line; `keep` is the order in which they win room.
  struct Field {
    std::string text;
    int keep;
  };
  const std::vector<Field> fields{
      {text_of("epoch %lld/%lld", static_cast<long long>(s.epoch), static_cast<long long>(s.epochs)), 0},
      {text_of("%3.0f%%", 100 * done), 1},
      {text_of("step %lld/%lld", static_cast<long long>(s.step), static_cast<long long>(s.steps)), 8},
      {"ETA " + format_duration(s.eta_seconds), 2},
      {text_of("loss %.4f", s.loss), 3},
      {text_of("%.*f img/s", s.images_per_second < 100 ? 1 : 0, s.images_per_second), 4},
      {text_of("lr %.1e", s.lr), 5},
      {text_of("wait %.1f%%", 100 * s.data_wait), 6},
      {"kept " + format_bytes(static_cast<int64_t>(s.activation_bytes)), 7},
  };
  size_t used = 0;
  std::vector<bool> shown(fields.size(), false);
  for (int rank = 0; rank < static_cast<int>(fields.size()); ++rank)
    for (size_t i = 0; i < fields.size(); ++i) {
      const size_t needed = fields[i].text.size() + (used ? 2 : 0);
      if (fields[i].keep != rank || (width > 0 && used + needed > static_cast<size_t>(width))) continue;
      shown[i] = true;
      used += needed;
    }
  const int room = width - static_cast<int>(used) - 4;  // brackets and spaces
  std::string line;
  for (size_t i = 0; i < fields.size(); ++i) {
    if (!shown[i]) continue;
    line += (line.empty() ? "" : "  ") + fields[i].text;
    if (i == 0 && width > 0 && room >= 6) line += "  " + format_bar(done, std::min(room, 30));
  }
  return line;
}

/// The last column would wrap on some terminals.
static int columns(int fd) { return terminal_width(fd) - 1; }

Progress::Progress(int64_t total_steps, int64_t first_step, int64_t log_interval, int fd, Clock clock)
    : fd_(fd),
      terminal_(isatty(fd) == 1),
      total_steps_(total_steps),
      done_steps_(0),
      first_step_(first_step),
      log_interval_(std::max<int64_t>(1, log_interval)),
      clock_(clock ? std::move(clock) : Clock(monotonic_seconds)),
      start_(clock_()),
      last_drawn_(-1e9) {}

Progress::~Progress() { finish(); }

// A terminal that went away must not stop the training; nothing else is lost, the log has it all.
void Progress::put(const std::string& text) {
  size_t done = 0;
  while (!broken_ && done < text.size()) {
    const ssize_t wrote = ::write(fd_, text.data() + done, text.size() - done);
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote < 0)
      broken_ = true;
    else
      done += static_cast<size_t>(wrote);
  }
}

void Progress::update(ProgressState state) {
  ++done_steps_;
  const double now = clock_();
  const auto left = static_cast<double>(total_steps_ - first_step_ - done_steps_);
  state.eta_seconds = std::max(0.0, left) * (now - start_) / static_cast<double>(done_steps_);
  const bool last = state.step == state.steps;
  if (!terminal_) {
    if (last || state.step % log_interval_ == 0) put(format_progress(state, 0) + "\n");
    return;
  }
  if (last || now - last_drawn_ >= kRedrawSeconds) draw(format_progress(state, columns(fd_)), now);
}

void Progress::tell(const std::string& text) {
  const double now = clock_();
  if (terminal_ && now - last_drawn_ >= kRedrawSeconds) draw(text.substr(0, static_cast<size_t>(columns(fd_))), now);
}

void Progress::draw(const std::string& line, double now) {
  last_drawn_ = now;
  last_ = line;
  put("\r" + last_ + "\x1b[K");
  line_open_ = true;
}

void Progress::print(const std::string& text) {
  if (!line_open_) return put(text + "\n");
  put("\r\x1b[K" + text + "\n" + last_);
}

void Progress::finish() {
  if (line_open_) put("\n");
  line_open_ = false;
}

}  // namespace mesa
