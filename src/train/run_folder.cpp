#include "run_folder.h"

#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/spdlog.h>

#include <cstdio>
#include <filesystem>

namespace mesa {

RunFolder::RunFolder(const RunConfig& config, bool resuming, const TrainingState& state, int64_t logged_step) : path_(config.output) {
  const bool used = std::filesystem::exists(checkpoint("last")) || std::filesystem::exists(path_ + "/summary.csv");
  check(resuming || !used, path_, " holds a run already; continue it with --resume, or choose another folder with --output");
  make_folders(path_ + "/checkpoints");
  write_file_atomically(path_ + "/config.yaml", to_yaml(config));
  const auto last_epoch = resuming ? std::optional<int64_t>(state.epoch) : std::nullopt;
  const auto last_step = resuming ? std::optional<int64_t>(logged_step) : std::nullopt;
  epochs_ = std::make_unique<EpochLog>(path_ + "/summary.csv", last_epoch);
  intervals_ = std::make_unique<IntervalLog>(path_ + "/metrics.jsonl", last_step);
  try {
    logger_ = std::make_shared<spdlog::logger>("run", std::make_shared<spdlog::sinks::basic_file_sink_mt>(path_ + "/log.txt", !resuming));
  } catch (const spdlog::spdlog_ex& e) {
    throw Error(e.what());
  }
  logger_->flush_on(spdlog::level::info);
  logger_->set_error_handler([](const std::string& text) { std::fprintf(stderr, "warning: log.txt cannot be written: %s\n", text.c_str()); });
}

RunFolder::~RunFolder() = default;

void RunFolder::log(const std::string& text) { logger_->info(text); }
void RunFolder::warn(const std::string& text) { logger_->warn(text); }

template <class F>
void RunFolder::attempt(F&& write) {
  try {
    write();
  } catch (const Error& e) {
    std::fprintf(stderr, "warning: %s; training goes on\n", e.what());
    warn(e.what());
  }
}

void RunFolder::append(const EpochRow& row) {
  attempt([&] { epochs_->append(row); });
}

void RunFolder::append(const IntervalRow& row) {
  attempt([&] { intervals_->append(row); });
}

void RunFolder::write_memory(const std::vector<SiteRecord>& sites) {
  std::vector<MemoryRow> rows;
  for (const SiteRecord& r : sites) rows.push_back({r.site.name(), to_string(r.shape), r.codec, r.exact_bytes, r.kept_bytes});
  attempt([&] { write_memory_csv(path_ + "/memory.csv", rows); });
}

void RunFolder::write_summary(const RunSummary& summary) {
  attempt([&] { write_summary_json(path_ + "/summary.json", summary); });
}

}  // namespace mesa
