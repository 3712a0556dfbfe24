// What the files of a checkpoint are called and which fields its state has, for writing and reading.
#pragma once
#include <string>

#include "mesa/train/checkpoint.h"

namespace mesa {

inline constexpr const char *kModelFile = "model.safetensors", *kEmaFile = "ema.safetensors", *kStateTensors = "state.safetensors",
                            *kStateFile = "state.json";
inline constexpr int kStateFormat = 1;

/// One list of the state's fields serves both directions.
template <class State, class F>
void each_field(State& s, F&& f) {
  f("epoch", s.epoch), f("batch", s.batch), f("step", s.step), f("micro_step", s.micro_step);
  f("bad_steps", s.bad_steps), f("bad_in_a_row", s.bad_in_a_row);
  f("epoch_loss", s.epoch_loss), f("epoch_images", s.epoch_images), f("epoch_seconds", s.epoch_seconds);
  f("train_seconds", s.train_seconds), f("train_images", s.train_images), f("bad_samples", s.bad_samples);
  f("interval_loss", s.interval_loss), f("interval_images", s.interval_images);
  f("interval_seconds", s.interval_seconds), f("interval_wait", s.interval_wait);
  f("best_top1", s.best_top1), f("evaluated_step", s.evaluated_step), f("peak_bytes", s.peak_bytes);
  f("eval_top1", s.eval_top1), f("eval_top5", s.eval_top5), f("eval_loss", s.eval_loss), f("train_loss", s.train_loss);
}
/// Those that the first checkpoints did not have.
template <class State, class F>
void each_later_field(State& s, F&& f) {
  f("eval_top1_ema", s.eval_top1_ema), f("eval_top5_ema", s.eval_top5_ema), f("eval_loss_ema", s.eval_loss_ema);
  f("ranks", s.ranks), f("branch", s.branch);
}

/// "step-00000120" of checkpoints/, where an older checkpoint stays.
std::string history_name(int64_t step);
/// The steps of those that are there, from the newest. `folder`: checkpoints/ of a run.
std::vector<int64_t> history_of(const std::string& folder);
/// What is left of those whose removal a crash interrupted goes.
void remove_history_leftovers(const std::string& folder);
/// The step that a checkpoint's state was taken at, as its state.json says it unverified; -1 if it does not.
int64_t step_of(const std::string& checkpoint);
/// A number of its state.json likewise.
double number_of(const std::string& checkpoint, const char* field, double otherwise);
/// The branch on which a run goes on that takes up `resumed`: a new one where `folder` (checkpoints/ of the run) has anything later.
int64_t branch_after(const std::string& resumed, const std::string& folder);

}  // namespace mesa
