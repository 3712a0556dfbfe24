// One update: forward and backward over the accumulated batches, finiteness checks, clipping, optimizer, moving average.
#pragma once
#include <functional>

#include "mesa/optim/schedule.h"
#include "mesa/train/checkpoint.h"
#include "mesa/train/objective.h"
#include "mesa/train/setup.h"
#include "recorded_steps.h"
#include "team.h"

namespace mesa {

struct UpdateResult {
  double loss = 0;  ///< mean over the images of the update
  int64_t images = 0;
  double gradient_norm = 0;
  double lr = 0;
  int64_t bad_samples = 0;  ///< that all ranks have met so far
  int64_t signal = 0;       ///< that some rank received: all stop after this update
  std::string bad;          ///< why the update was skipped and where the first NaN or infinity appeared; empty for a good one
};

class Updater {
 public:
  /// `ema`, and for one rank `sync`, may be null. `records`: bytes that recorded passes are known to need.
  Updater(const RunConfig& config, BuiltModel& model, StoragePolicy& policy, GradientSync* sync, Optimizer& optimizer, Ema* ema,
          const Schedule& schedule, const TransformOptions& transform, Team& team, int64_t records);
  /// Called when work has been handed to the device: what it copies may begin after the mark (null: now) and runs beside that work.
  using Meanwhile = std::function<void(const cuda::Mark& after)>;
  /// Takes `count` batches, one at a time, for one update, and advances step, micro_step and the counts of bad steps. `meanwhile` is called
  /// once for each batch.
  UpdateResult operator()(int64_t count, const std::function<SentBatch()>& next, const Meanwhile& meanwhile, TrainingState& state);
  /// Asks this after each update how many damaged pictures this rank's loader has met so far.
  void count_bad_samples(std::function<int64_t()> count) { bad_samples_ = std::move(count); }
  /// Seconds in which nothing was done but wait for the other ranks' gradients.
  double sync_wait_seconds() const { return sync_ != nullptr ? sync_->wait_seconds() : 0; }
  /// Kept activations of the last forward pass, by the meter.
  int64_t activation_bytes() const { return activation_bytes_; }

 private:
  /// `last`: of the update, so that its gradients are final and leave for the other ranks as they come.
  double forward_backward(const SentBatch& batch, uint64_t micro_step, double scale, const Meanwhile& meanwhile, bool last);
  /// Hands it over to the device; the loss is there later.
  Tensor pass(const SentBatch& batch, uint64_t micro_step, const uint64_t* live_step, double scale, const Meanwhile& meanwhile, bool last);
  void average_ranges();
  bool agree(UpdateResult& result, const std::string& packed);
  std::string name_culprit(const SentBatch& batch, uint64_t micro_step, const std::string& packed);
  /// "" if this rank finds nothing.
  std::string find_culprit(const SentBatch& batch, uint64_t micro_step, const std::string& packed);
  std::string first_bad_value(StoragePolicy policy, const SentBatch& batch, uint64_t micro_step);

  const RunConfig& config_;
  BuiltModel& model_;
  StoragePolicy& policy_;
  GradientSync* sync_;
  Optimizer& optimizer_;
  Ema* ema_;
  Schedule schedule_;
  TransformOptions transform_;
  Objective objective_;
  Team& team_;
  std::function<int64_t()> bad_samples_;
  std::optional<RecordedSteps> recorded_;
  int64_t activation_bytes_ = 0;
};

}  // namespace mesa
