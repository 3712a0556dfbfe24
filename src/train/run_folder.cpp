#include "run_folder.h"

#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/spdlog.h>

#include <cmath>
#include <cstdio>
#include <filesystem>

#include "checkpoint_files.h"

namespace mesa {

std::string to_string(const RunSummary& s, double best_top1) {
  char text[160];
  const double kept = s.activation_bytes_per_image, exact = s.exact_activation_bytes_per_image;
  std::snprintf(text, sizeof text, "top-1 %.2f %%, ", s.top1);
  std::string out = text;
  if (!std::isnan(s.top1_ema)) {
    std::snprintf(text, sizeof text, "%.2f %% with averaged weights, ", s.top1_ema);
    out += text;
  }
  std::snprintf(text, sizeof text, "best %.2f %%, %.1f images/s, ", best_top1, s.images_per_second);
  out += text + format_bytes(std::llround(kept)) + " kept per image";
  if (kept <= 0 || exact < 1.005 * kept) return out;
  std::snprintf(text, sizeof text, ", %.1f times less than the ", exact / kept);
  return out + text + format_bytes(std::llround(exact)) + " of exact storage";
}

RunFolder::RunFolder(const RunConfig& config, const std::optional<LogPosition>& position, bool replace) : path_(config.output) {
  bool checkpoints = !history_of(path_ + "/checkpoints").empty();
  for (const char* name : {"last", "best"}) checkpoints = checkpoints || std::filesystem::exists(checkpoint(name));
  const bool used = checkpoints || (std::filesystem::exists(path_ + "/summary.csv") && !replace);
  if (used && !position)
    throw Error(concat(path_, " holds a run already; continue it with --resume, or choose another folder with --output"));
  make_folders(path_ + "/checkpoints");
  write_file_atomically(path_ + "/config.yaml", to_yaml(config));
  epochs_ = std::make_unique<EpochLog>(path_ + "/summary.csv", position ? std::optional(position->epoch) : std::nullopt);
  intervals_ = std::make_unique<IntervalLog>(path_ + "/metrics.jsonl", position ? std::optional(position->step) : std::nullopt);
  try {
    const auto file = std::make_shared<spdlog::sinks::basic_file_sink_mt>(path_ + "/log.txt", !position);
    logger_ = std::make_shared<spdlog::logger>("run", file);
  } catch (const spdlog::spdlog_ex& e) {
    throw Error(e.what());
  }
  logger_->flush_on(spdlog::level::info);
  logger_->set_error_handler(
      [](const std::string& text) { std::fprintf(stderr, "warning: log.txt cannot be written: %s\n", text.c_str()); });
}

RunFolder::~RunFolder() = default;

void RunFolder::log(const std::string& text) { logger_->info(text); }
void RunFolder::warn(const std::string& text) { logger_->warn(text); }

template <class F>
void RunFolder::attempt(const std::string& what, F&& write) {
  try {
    write();
    failed_.erase(what);
  } catch (const Error& e) {
    std::fprintf(stderr, "warning: %s; training goes on\n", e.what());
    warn(e.what());
    failed_.insert(what);
  }
}

/// Rows that a full disk refused wait for the next one. The table is opened anew after a failure, which cuts off a torn line.
template <class Log, class Row>
void RunFolder::write_rows(std::unique_ptr<Log>& log, std::vector<Row>& rows, const std::string& path, int64_t before) {
  attempt(path, [&] {
    try {
      if (!log) log = std::make_unique<Log>(path, before);
      while (!rows.empty()) {
        log->append(rows.front());
        rows.erase(rows.begin());
      }
    } catch (const Error&) {
      log.reset();
      throw;
    }
  });
}

void RunFolder::append(const EpochRow& row) {
  epoch_rows_.push_back(row);
  write_rows(epochs_, epoch_rows_, path_ + "/summary.csv", epoch_rows_.front().epoch - 1);
}

void RunFolder::append(const IntervalRow& row) {
  interval_rows_.push_back(row);
  write_rows(intervals_, interval_rows_, path_ + "/metrics.jsonl", interval_rows_.front().step - 1);
}

void RunFolder::write_memory(const std::vector<SiteRecord>& sites) {
  std::vector<MemoryRow> rows;
  for (const SiteRecord& r : sites) {
    const double share = r.elements > 0 ? static_cast<double>(r.saturated) / static_cast<double>(r.elements) : 0;
    rows.push_back({r.site.name(), to_string(r.shape), r.codec, r.exact_bytes, r.kept_bytes, share});
  }
  attempt("memory.csv", [&] { write_memory_csv(path_ + "/memory.csv", rows); });
}

void RunFolder::write_summary(const RunSummary& summary) {
  attempt("summary.json", [&] { write_summary_json(path_ + "/summary.json", summary); });
}

}  // namespace mesa
