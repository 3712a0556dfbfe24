// What a run shows of itself beside its tables: pictures, event files, health, report.html, and one warning for each odd thing. All of it
// is best effort: what cannot be written is warned of, and training goes on.
#pragma once
#include <functional>
#include <optional>
#include <set>

#include "mesa/train/confusion.h"
#include "mesa/train/health.h"
#include "mesa/train/pictures.h"
#include "run_folder.h"
#include "updater.h"

namespace mesa {

/// Throws UsageError for a train.histograms that matches neither a parameter nor a site that is looked at.
void check_histograms(const RunConfig& config, const ParamStore& params, const Plan& plan);

class RunWatch {
 public:
  struct Parts {
    const RunConfig& config;
    RunFolder& folder;
    StoragePolicy& policy;
    const ParamStore& params;
    const Dataset& data;
    Device device;
  };
  using Warn = std::function<void(const std::string&)>;
  /// `position`: where a resumed run goes on.
  RunWatch(const Parts& parts, const std::optional<LogPosition>& position, Warn warn);

  /// A batch of the training loader, before anything on the device changes it.
  void on_batch(const Batch& batch);
  /// Before and after the update that makes `step`, counted from 1.
  void before_update(int64_t step) { health_.begin(step); }
  void after_update(const UpdateResult& result, const TrainingState& state, double seconds, double wait);
  void on_interval(const IntervalRow& row);
  /// A batch of the evaluation, logits f32 [B, K] on the CPU.
  void on_evaluated(const Batch& batch, const Tensor& logits) { mistakes_.take(batch, logits); }
  /// After an evaluation. Also writes the sites' saturation since the last epoch, and begins to count anew.
  void after_epoch(const EpochRow& row, const Confusion& confusion);
  void write_report();

 private:
  void write_environment();
  void watch_ranges();
  void write_health(int64_t step, bool good);
  void write_histograms(int64_t step);
  void warn_once(const std::string& topic, const std::string& text);
  template <class F>
  void attempt(const std::string& what, F&& write);

  Parts parts_;
  std::optional<int64_t> resumed_at_;  // step
  Warn warn_;
  HealthMonitor health_;
  MistakeFinder mistakes_;
  std::unique_ptr<EventLog> events_;
  std::unique_ptr<HealthLog> health_log_;
  std::optional<int64_t> health_until_;  // step of the last row
  std::set<std::string> told_;
  bool sampled_ = false, fresh_ = true;
  WaitWatch wait_;
  StragglerWatch stragglers_;
  double report_seconds_ = 0;
};

}  // namespace mesa
