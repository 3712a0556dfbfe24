// How a run saves: beside training while that lasts, and to the end before the process ends.
#include <algorithm>
#include <chrono>
#include <thread>

#include "run.h"

namespace mesa {

/// Begins to write the present state as each of `names`. What is due while the one before is still being written waits for it, so that the
/// checkpoints are those that the config asks for, on every machine and on all ranks.
void Run::save(std::vector<std::string> names) {
  if (!team_.leads()) return give_state(names);
  const auto busy = team_.busy();
  wait_for_writer();
  saved_ = copy_state(names);
  if (saved_) writer_->write(std::move(names), true);
}

/// Returns when the present state is on the disk, or false.
bool Run::save_now(const std::string& which) {
  const auto busy = team_.leads() ? team_.busy() : nullptr;
  wait_for_writer();
  bool held = which == "last" && writer_ && writer_->holds(state_);
  if (optimizer_->sharded()) held = team_.shared("whether the checkpoint is there already", held ? "yes" : "no") == "yes";
  if (held) return true;
  if (!team_.leads()) return give_state({which}), true;
  if (!copy_state({which})) return false;
  writer_->write({which}, false);
  return settle();
}

/// Why the state is not worth saving, or "": one that nobody could resume must not replace a good one. The same on all ranks.
std::string Run::unfit(const std::vector<std::string>& names) const {
  const bool of_failure = names == std::vector<std::string>{"failed"};
  return of_failure || names.empty() ? "" : first_bad_parameter(model_.params);
}

/// What the leader's copy needs of this rank: its part of a shared optimizer's state.
void Run::give_state(const std::vector<std::string>& names) {
  if (optimizer_->sharded() && unfit(names).empty()) optimizer_->state();
}

bool Run::copy_state(const std::vector<std::string>& names) {
  if (const std::string bad = unfit(names); !bad.empty()) {
    warn(concat("the checkpoint is not replaced: the weights are not finite, first in ", bad));
    return false;
  }
  const std::map<std::string, Tensor> moments = optimizer_->state();  // before anything can fail on this rank alone
  try {
    state_.peak_bytes = peak_bytes();
    writer_->copy({config_, data_.train->class_names(), model_.params, *optimizer_, moments, policy_, ema_.get()}, state_);
    return true;
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
  if (!written->error.empty())
    return warn(concat("the checkpoint of step ", written->step, " could not be written: ", written->error,
                       "; the one before it stays, and it is tried again"));
  char seconds[32];
  std::snprintf(seconds, sizeof seconds, "%.2f", written->seconds);
  folder_->log(
      concat("checkpoint of step ", written->step, " written as ", names, ": ", format_bytes(writer_->bytes()), " in ", seconds, " s"));
}

}  // namespace mesa
