// One training run: everything that it consists of, and what it does from its beginning to its end.
#pragma once
#include <algorithm>
#include <memory>
#include <optional>
#include <string>

#include "folder_lock.h"
#include "mesa/train/checkpoint_writer.h"
#include "mesa/train/confusion.h"
#include "mesa/train/evaluate.h"
#include "mesa/train/optimizer_setup.h"
#include "mesa/train/trainer.h"
#include "product_tuning.h"
#include "run_folder.h"
#include "run_watch.h"
#include "updater.h"

namespace mesa {

/// All parts of one run. The members are made in this order.
class Run {
 public:
  Run(RunConfig config, const TrainOptions& options, World& world);
  int operator()();

 private:
  void start();
  void take_up(const std::string& checkpoint);
  void move_to_batch(int64_t images_then);
  void check_alike(World& world);
  void open_folder();
  void introduce();
  int loop();
  bool train_epoch();
  SentBatch next_batch();
  void look_ahead(const cuda::Mark& after);
  void report(const UpdateResult& result, double seconds);
  void show(const UpdateResult& result);
  void add_data_shares(IntervalRow& row);
  void tell_of_ranks(IntervalRow& row, int64_t steps);
  bool end_epoch();
  void take_results(const Evaluations& eval);
  void save(std::vector<std::string> names);
  bool save_what_is_left(bool present_state);
  bool save_now(const std::string& which);
  bool copy_state(const std::vector<std::string>& names);
  void wait_for_writer();
  void retry();
  bool settle();
  void take(const std::optional<CheckpointWriter::Result>& written);
  int stopped_by_signal();
  int stopped_by_bad_steps();
  int finish();
  RunSummary write_summary();
  void say(const std::string& text);
  void warn(const std::string& text);
  /// The peak of this process and of those that the run was resumed from.
  int64_t peak_bytes() const { return std::max(state_.peak_bytes, Allocator::of(model_.device).use().peak); }
  double bytes_per_image() const {
    const int64_t bytes = updater_.activation_bytes() > 0 ? updater_.activation_bytes() : plan_.activation_bytes;
    return static_cast<double>(bytes) / static_cast<double>(config_.train.batch_size);
  }
  bool steps_used_up() const { return config_.train.steps > 0 && state_.step >= config_.train.steps; }
  bool done() const { return state_.epoch >= config_.train.epochs || (steps_used_up() && state_.evaluated_step == state_.step); }

  RunConfig config_;
  TrainOptions options_;
  Team team_;
  std::string resume_;
  DatasetPair data_;
  NetConfig net_;
  TransformOptions transform_;
  Plan plan_;
  Loader train_loader_, eval_loader_;
  Predictions predictions_;
  BuiltModel model_;
  StoragePolicy policy_;
  std::unique_ptr<GradientSync> sync_;  // or null
  std::unique_ptr<Optimizer> optimizer_;
  std::unique_ptr<Ema> ema_;  // or null
  int64_t updates_per_epoch_;
  Schedule schedule_;
  Updater updater_;
  TrainingState state_;
  uint64_t optimizer_hash_ = 0;  // of what was resumed
  std::optional<SentBatch> ahead_;
  int64_t taken_ = 0;                 // batches of this epoch
  std::unique_ptr<FolderLock> lock_;  // the leader's, as are those below that write
  std::unique_ptr<RunFolder> folder_;
  std::unique_ptr<ProductTuning> products_;  // or null
  std::unique_ptr<CheckpointWriter> writer_;
  std::unique_ptr<RunWatch> watch_;
  std::unique_ptr<Progress> progress_;
  std::string changes_;                   // against the checkpoint
  std::string start_;                     // what was begun with
  int64_t signal_ = 0;                    // that all ranks know of
  std::vector<std::string> rejected_;     // checkpoints that could not be resumed, and why
  double interval_writing_ = 0;           // seconds of the interval's steps beside which a checkpoint was written
  double saved_best_ = -1, judged_ = -1;  // top-1 of what is on the disk as `best`, and of the last evaluation
  bool finished_before_ = false, saved_ = true, first_update_done_ = false, copied_ = false, told_of_waiting_ = false;
  int64_t bad_samples_before_ = 0;
  size_t reported_skips_ = 0, reported_left_out_ = 0, reported_slow_ = 0;
  double last_wait_ = 0, last_sync_wait_ = 0;
  StageTimes last_stages_;
  double stages_since_ = 0;
};

}  // namespace mesa
