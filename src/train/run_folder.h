// The files of one run: config, tables, log and checkpoints. A failure to write a log never stops training.
#pragma once
#include <memory>
#include <optional>
#include <set>

#include "mesa/train/checkpoint.h"
#include "mesa/train/metrics.h"
#include "mesa/train/plan.h"

namespace spdlog {
class logger;
}

namespace mesa {

/// The last rows that a resumed run keeps of its tables.
struct LogPosition {
  int64_t epoch = 0, step = 0;
};

/// The last line of a run: "top-1 97.10 %, best 97.25 %, 812.3 images/s, 30.1 kB kept per image, 3.9 times less than ...".
std::string to_string(const RunSummary& summary, double best_top1);

class RunFolder {
 public:
  /// Creates the folder, or continues it after `position`. Throws Error if it cannot be written, and if it holds a run and is neither
  /// continued nor `replace` (a run that ended before its first checkpoint).
  RunFolder(const RunConfig& config, const std::optional<LogPosition>& position, bool replace);
  ~RunFolder();

  const std::string& path() const { return path_; }
  std::string checkpoint(const std::string& which) const { return path_ + "/checkpoints/" + which; }
  void log(const std::string& text);
  void warn(const std::string& text);
  void append(const EpochRow& row);
  void append(const IntervalRow& row);
  void write_memory(const std::vector<SiteRecord>& sites);
  void write_summary(const RunSummary& summary);
  /// False if something could not be written and is still missing.
  bool complete() const { return failed_.empty() && epoch_rows_.empty() && interval_rows_.empty(); }

 private:
  template <class Log, class Row>
  void write_rows(std::unique_ptr<Log>& log, std::vector<Row>& rows, const std::string& path, int64_t before);
  template <class F>
  void attempt(const std::string& what, F&& write);
  std::string path_;
  std::set<std::string> failed_;  // files
  std::shared_ptr<spdlog::logger> logger_;
  std::unique_ptr<EpochLog> epochs_;
  std::unique_ptr<IntervalLog> intervals_;
  std::vector<EpochRow> epoch_rows_;  // not yet written: all but empty unless the disk is full
  std::vector<IntervalRow> interval_rows_;
};

}  // namespace mesa
