// Checkpoints of a run that are written beside its training, one at a time.
#pragma once
#include <atomic>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "mesa/train/checkpoint.h"

namespace mesa {

/// All calls come from one thread, the trainer's. What goes wrong in writing is a result, never an exception: the folders that were there
/// before stay, and the copy waits for another try.
class CheckpointWriter {
 public:
  struct Result {
    int64_t step = 0;
    std::vector<std::string> names;  ///< the folders that were to be written
    double seconds = 0;
    std::string error;     ///< "" if all of them were
    std::string leftover;  ///< why an older one could not be removed, or ""
  };

  /// `folder`: checkpoints/ of the run, where `keep` older ones stay beside `last` and `best`. `resumed`: the checkpoint that the run goes
  /// on from, which is known to be whole, or "".
  CheckpointWriter(std::string folder, int64_t keep, const std::string& resumed);
  /// Waits for the thread.
  ~CheckpointWriter();

  /// Takes the copy that is to be written next into the memory of the one before. Nothing may be being written.
  void copy(const CheckpointParts& parts, const TrainingState& state);
  /// Begins to write the copy, as each of `names`. Beside training it is done by a thread that yields to all others; else before this
  /// returns.
  void write(std::vector<std::string> names, bool beside);
  /// True from write() on until its result was taken.
  bool busy() const { return running_; }
  /// True while the disk is being written to.
  bool writing() const { return running_ && !done_; }
  /// The result, once it is there, of the last write().
  std::optional<Result> finished();
  /// The same, waited for; nothing if nothing is being written.
  std::optional<Result> wait();

  /// Folders of the copy that could not be written.
  const std::vector<std::string>& failed() const { return failed_; }
  /// The step of the state that was written as `last`, -1 if there is none yet.
  int64_t written_step() const { return written_step_; }
  /// True if `last` holds this very state.
  bool holds(const TrainingState& state) const;
  int64_t bytes() const { return data_.bytes(); }  ///< of the copy

 private:
  void run();
  void write_one(const std::string& name);
  std::string former_name();
  void prune(int64_t step) const;

  std::string folder_;
  int64_t keep_;
  CheckpointData data_;
  std::thread thread_;
  std::atomic<bool> done_ = false;
  bool running_ = false;
  // Of the thread while it runs.
  Result result_;
  std::vector<std::string> not_written_;
  int64_t whole_last_ = -1;  // step of `last`, if that is known to be whole
  // Of the trainer's.
  std::vector<std::string> failed_;
  int64_t written_step_ = -1, written_evaluation_ = -1;  // step and evaluated_step of the state that was written as `last`
};

}  // namespace mesa
