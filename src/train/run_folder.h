// The files of one run: config, tables, log and checkpoints. A failure to write a log never stops training.
#pragma once
#include <memory>

#include "mesa/train/checkpoint.h"
#include "mesa/train/metrics.h"
#include "mesa/train/plan.h"

namespace spdlog {
class logger;
}

namespace mesa {

class RunFolder {
 public:
  /// Creates the folder (or continues it, dropping rows beyond the resumed state). Throws Error if it cannot be written, and if it
  /// holds another run that is not being resumed.
  RunFolder(const RunConfig& config, bool resuming, const TrainingState& state, int64_t logged_step);
  ~RunFolder();

  const std::string& path() const { return path_; }
  std::string checkpoint(const std::string& which) const { return path_ + "/checkpoints/" + which; }
  void log(const std::string& text);
  void warn(const std::string& text);
  void append(const EpochRow& row);
  void append(const IntervalRow& row);
  void write_memory(const std::vector<SiteRecord>& sites);
  void write_summary(const RunSummary& summary);

 private:
  template <class F>
  void attempt(F&& write);
  std::string path_;
  std::shared_ptr<spdlog::logger> logger_;
  std::unique_ptr<EpochLog> epochs_;
  std::unique_ptr<IntervalLog> intervals_;
};

}  // namespace mesa
