// How a run saves: beside training while that lasts, and to the end before the process ends.
#include <algorithm>
#include <chrono>
#include <thread>

#include "run.h"

namespace mesa {

/// Begins to write the present state as each of `names`. What is due while the one before is still being written waits for it, so that the
/// checkpoints are those that the config asks for, on every machine and on all ranks.
void Run::save(std::vector<std::string> names) {
  wait_for_writer();
  retry();
  saved_ = copy_state(names);
  if (saved_ && writer_) writer_->write(std::move(names), true);
}

/// Returns when the present state is on the disk, or false.
bool Run::save_now(const std::string& which) {
  wait_for_writer();
  bool held = which == "last" && writer_ && writer_->holds(state_);
  if (optimizer_->sharded()) held = team_.shared("whether the checkpoint is there already", held ? "yes" : "no") == "yes";
  if (held) return settle();
  retry();
  if (!copy_state({which})) return false;
  if (!writer_) return true;
  const auto busy = team_.busy();
  writer_->write({which}, false);
  return settle();
}

/// On the leader, copies the state; the others give what they have of a shared optimizer's. False if there is no state worth saving: one
/// that nobody could resume must not replace a good one.
bool Run::copy_state(const std::vector<std::string>& names) {
  copied_ = true;
  if (products_) products_->keep();
  if (!writer_ && !optimizer_->sharded()) return true;
  const bool of_failure = names == std::vector<std::string>{"failed"};
  std::string bad = of_failure || names.empty() ? "" : first_bad_parameter(model_.params);
  if (optimizer_->sharded()) bad = team_.first_of("which parameter is not finite", bad);  // what follows is for all or for none
  if (!bad.empty()) {
    if (writer_) warn(concat("the checkpoint is not replaced: the weights are not finite, first in ", bad));
    return false;
  }
  try {
    const std::map<std::string, Tensor> moments = optimizer_->state();
    if (!writer_) return true;
    const auto busy = team_.busy();
    state_.peak_bytes = peak_bytes();
    writer_->copy({config_, data_.train->class_names(), model_.params, *optimizer_, moments, policy_, ema_.get()}, state_);
    return true;
  } catch (const RankFailure&) {
    throw;
  } catch (const std::exception& e) {
    if (names.empty()) throw;
    warn(concat("the checkpoint of step ", state_.step, " could not be written: ", e.what()));
    return false;
  }
}

void Run::wait_for_writer() {
  if (!writer_ || !writer_->busy()) return;
  const auto start = std::chrono::steady_clock::now();
  const auto busy = team_.busy();
  take(writer_->wait());
  const double waited = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (waited < 1 || told_of_waiting_ || signal_ != 0 || done()) return;
  told_of_waiting_ = true;
  char text[64];
  std::snprintf(text, sizeof text, "%.1f", waited);
  say(concat("training waited ", text, " seconds for a checkpoint to be written; with a longer train.checkpoint_interval it need not"));
}

/// What could not be written is tried once more before the next copy takes its place.
void Run::retry() {
  if (!writer_ || writer_->failed().empty()) return;
  const auto busy = team_.busy();
  writer_->write(writer_->failed(), false);
  take(writer_->wait());
}

/// Waits for what is being written and tries a few times more what could not be. True if all is on the disk.
bool Run::settle() {
  if (!writer_) return true;
  const auto busy = team_.busy();
  take(writer_->wait());
  for (const auto pause : {std::chrono::milliseconds(200), std::chrono::milliseconds(1000)}) {
    if (writer_->failed().empty()) break;
    std::this_thread::sleep_for(pause);
    writer_->write(writer_->failed(), false);
    take(writer_->wait());
  }
  return writer_->failed().empty();
}

void Run::take(const std::optional<CheckpointWriter::Result>& written) {
  if (!written) return;
  std::string names;
  for (const std::string& name : written->names) {
    names += (names.empty() ? "" : ", ") + name;
    const auto& failed = writer_->failed();
    if (name == "best" && std::find(failed.begin(), failed.end(), name) == failed.end()) saved_best_ = judged_;
  }
  if (!written->leftover.empty()) warn(concat("an older checkpoint stays: ", written->leftover));
  if (!written->error.empty())
    return warn(concat("the checkpoint of step ", written->step, " could not be written: ", written->error,
                       "; the one before it stays, and it is tried again"));
  char seconds[32];
  std::snprintf(seconds, sizeof seconds, "%.2f", written->seconds);
  folder_->log(
      concat("checkpoint of step ", written->step, " written as ", names, ": ", format_bytes(writer_->bytes()), " in ", seconds, " s"));
}

}  // namespace mesa
