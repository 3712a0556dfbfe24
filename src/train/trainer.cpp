#include "mesa/train/trainer.h"

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>

#include "mesa/kernels/conv.h"
#include "mesa/train/signals.h"
#include "run.h"

namespace mesa {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

int Run::operator()() {
  introduce();
  if (finished_before_) {
    say(concat("the run is finished already; raise train.", state_.epoch >= config_.train.epochs ? "epochs" : "steps", " to train on"));
    return finish();
  }
  Allocator::of(model_.device).reset_peak();  // reading a checkpoint is no part of training
  if (!options_.quiet && team_.leads())
    progress_ = std::make_unique<Progress>(schedule_.total_steps, state_.step, config_.train.log_interval);
  const TrainingState start = state_;
  stages_since_ = now();
  try {
    return loop();
  } catch (const std::exception& e) {
    // Such as a damaged picture after hours: what was trained is kept, and can be resumed once the cause is mended.
    const std::string place = concat("epoch ", state_.epoch + 1, ", step ", state_.step);
    if (folder_) folder_->warn(concat("error at ", place, ": ", e.what()));
    if (progress_) progress_->finish();
    progress_.reset();
    const bool lost = dynamic_cast<const RankFailure*>(&e) != nullptr;  // perhaps this very rank, for which others go on elsewhere
    // A shared optimizer's state cannot be put together any more.
    const bool kept = save_what_is_left(!lost && team_.leads() && !optimizer_->sharded() && state_.step > start.step);
    if (lost) throw;
    const std::string what = concat(e.what(), " (at ", place, kept ? "; the state before it is saved: continue with --resume)" : ")");
    if (dynamic_cast<const OutOfMemory*>(&e)) throw OutOfMemory(what);
    throw Error(what);
  }
}

/// What is being written becomes whole, and the present state, too, where it is there to be had. After an error of the GPU it is not: then
/// the error matters, and not what this one meets.
bool Run::save_what_is_left(bool present_state) {
  try {
    settle();
    return present_state && save_now("last");
  } catch (const std::exception&) {
    return false;
  }
}

int Run::loop() {
  while (!done()) {
    if (!train_epoch()) return signal_ != 0 ? stopped_by_signal() : stopped_by_bad_steps();
    if (!end_epoch()) return stopped_by_signal();
  }
  return finish();
}

/// The rest of the current epoch. False if a signal or too many bad steps ended it early, between two updates.
bool Run::train_epoch() {
  const int64_t batches = train_loader_.batches_per_epoch();
  ahead_.reset();
  taken_ = state_.batch;
  if (state_.batch < batches && !steps_used_up()) train_loader_.start_epoch(state_.epoch, state_.batch);
  while (state_.batch < batches && !steps_used_up()) {
    if (team_.alone()) signal_ = received_signal();
    if (signal_ != 0) return false;
    const double start = now();
    const bool writing = writer_ && writer_->writing();
    const TrainingState before = state_;
    if (watch_) watch_->before_update(state_.step + 1);
    const int64_t count = std::min(config_.train.accumulation, batches - state_.batch);  // fewer at the end of an epoch
    UpdateResult result;
    try {
      result = updater_(
          count, [this] { return next_batch(); }, [this](const cuda::Mark& after) { look_ahead(after); }, state_);
    } catch (...) {  // also of too little memory
      state_ = before;
      policy_.roll_back();  // ranges and running statistics have seen the batches of an update that does not count
      try {
        model_.params.restore_buffers();
      } catch (const Error&) {  // after an error of the GPU nothing can be copied on it, and the error is what matters
      }
      throw;
    }
    state_.batch += count;
    signal_ = result.signal;
    team_.at_step(state_.step);
    const double seconds = now() - start;
    if (writing) interval_writing_ += seconds;
    report(result, seconds);
    if (state_.bad_in_a_row >= config_.train.max_bad_steps) return false;
    const int64_t every = config_.train.checkpoint_interval;
    if (every > 0 && state_.step % every == 0 && state_.batch < batches) save({"last"});
  }
  ahead_.reset();  // where a run ends within an epoch; an evaluation follows, whose batches need the room
  return true;
}

SentBatch Run::next_batch() {
  ++taken_;
  if (ahead_) {
    SentBatch batch = std::move(*ahead_);
    ahead_.reset();
    return batch;
  }
  auto batch = train_loader_.next();
  check(batch.has_value(), "the loader ended before the epoch");
  if (watch_) watch_->on_batch(*batch);
  return send(std::move(*batch), net_.input().classes, model_.device);
}

/// While a GPU works on one batch, the next one is on its way to it.
void Run::look_ahead(const cuda::Mark& after) {
  if (model_.device.kind != DeviceKind::cuda || ahead_ || taken_ >= train_loader_.batches_per_epoch()) return;
  if (auto batch = train_loader_.next()) ahead_ = send(std::move(*batch), net_.input().classes, model_.device, after);
}

void Run::report(const UpdateResult& result, double seconds) {
  const double wait = train_loader_.wait_seconds() - last_wait_;
  last_wait_ += wait;
  state_.train_seconds += seconds, state_.epoch_seconds += seconds, state_.interval_seconds += seconds;
  state_.interval_wait += wait;
  state_.train_images += result.images;
  state_.bad_samples = bad_samples_before_ + result.bad_samples;
  if (!first_update_done_) {
    if (folder_) folder_->write_memory(policy_.sites());
    if (!copied_) copy_state({});  // the copy's memory from here on: if there is too little of it, that shows now
  }
  first_update_done_ = true;
  if (writer_) take(writer_->finished());
  if (watch_) watch_->after_update(result, state_, seconds, wait);
  if (result.bad.empty()) {
    const double sum = result.loss * static_cast<double>(result.images);
    state_.epoch_loss += sum, state_.interval_loss += sum;
    state_.epoch_images += result.images, state_.interval_images += result.images;
  }
  for (const std::vector<std::string> slow = kernels::slow_convolutions(); reported_slow_ < slow.size(); ++reported_slow_)
    warn("convolutions are slow: " + slow[reported_slow_]);
  for (; reported_skips_ < train_loader_.skipped_samples().size(); ++reported_skips_)
    warn("a bad sample is replaced: " + train_loader_.skipped_samples()[reported_skips_]);
  show(result);
}

/// What the loader's threads did since the last row, or since this process began.
void Run::add_data_shares(IntervalRow& row) {
  const StageTimes stages = train_loader_.stage_times(), spent = stages - last_stages_;
  const double time = now(), threads_seconds = (time - stages_since_) * static_cast<double>(train_loader_.workers());
  row.data_read = spent.read / threads_seconds, row.data_decode = spent.decode / threads_seconds;
  row.data_augment = spent.augment / threads_seconds;
  last_stages_ = stages;
  stages_since_ = time;
}

/// The live line, and each log_interval steps, and at the last one, a line of metrics.jsonl.
void Run::show(const UpdateResult& result) {
  const double n = static_cast<double>(state_.interval_images), seconds = state_.interval_seconds;
  const double wait = seconds > 0 ? std::min(1.0, state_.interval_wait / seconds) : 0;
  const double rate = seconds > 0 ? n / seconds : 0, loss = n > 0 ? state_.interval_loss / n : kNotMeasured;
  if (progress_) {
    ProgressState p;
    p.epoch = state_.epoch + 1, p.epochs = config_.train.epochs;
    p.step = (state_.batch + config_.train.accumulation - 1) / config_.train.accumulation, p.steps = updates_per_epoch_;
    p.loss = loss, p.lr = result.lr, p.images_per_second = rate, p.data_wait = wait;
    p.activation_bytes = static_cast<double>(updater_.activation_bytes());
    progress_->update(p);
  }
  const int64_t steps = (state_.step - 1) % config_.train.log_interval + 1;  // since the last line
  if (steps < config_.train.log_interval && state_.step != schedule_.total_steps) return;
  IntervalRow row{state_.step, state_.epoch + 1,  loss,         result.lr,        result.gradient_norm, rate,
                  wait,        bytes_per_image(), peak_bytes(), state_.bad_steps, state_.bad_samples};
  add_data_shares(row);
  if (writer_) row.checkpoint_step = writer_->written_step();
  row.checkpoint_writing = state_.interval_seconds > 0 ? std::min(1.0, interval_writing_ / state_.interval_seconds) : 0;
  interval_writing_ = 0;
  if (!team_.alone()) tell_of_ranks(row, steps);
  if (folder_) folder_->append(row);
  if (watch_) watch_->on_interval(row);
  state_.interval_images = 0;
  state_.interval_loss = state_.interval_seconds = state_.interval_wait = 0;
}

/// Who is slow: a rank that others wait for shows a longer time of its own, and they wait.
void Run::tell_of_ranks(IntervalRow& row, int64_t steps) {
  const double waited = updater_.sync_wait_seconds() - last_sync_wait_;
  last_sync_wait_ += waited;
  row.sync_wait = state_.interval_seconds > 0 ? std::min(1.0, waited / state_.interval_seconds) : 0;
  row.rank_seconds = team_.gather((state_.interval_seconds - waited) / static_cast<double>(steps));
  row.slowest = slowest_of(row.rank_seconds);
}

/// Evaluates, logs and saves. False if a signal interrupts the evaluation, which is then done again after the resume.
bool Run::end_epoch() {
  const auto look = [this](const Batch& batch, const Tensor& logits) {
    predictions_.take(batch, logits);
    if (watch_) watch_->on_evaluated(batch, logits);
  };
  const auto add_up = [this](std::vector<double>& values) { team_.add_up(values); };
  const auto tell = [this](int64_t done) {
    const int64_t share = 100 * done * team_.size() / std::max<int64_t>(data_.test->size(), 1);
    if (progress_)
      progress_->tell(concat("epoch ", state_.epoch + 1, "/", config_.train.epochs, "  evaluating ", std::min<int64_t>(share, 100), "%"));
  };
  const Evaluations eval = evaluate_all(
      model_, ema_.get(), eval_loader_, transform_, [this] { return team_.heard_signal() != 0; }, tell, look, add_up);
  if (!eval.complete()) {
    signal_ = team_.largest(team_.heard_signal());
    return false;
  }
  for (; reported_left_out_ < eval_loader_.skipped_samples().size(); ++reported_left_out_)
    warn("a bad test sample is left out: " + eval_loader_.skipped_samples()[reported_left_out_]);
  const Confusion confusion = predictions_.finish(add_up);
  take_results(eval);
  const double rate = state_.epoch_seconds > 0 ? static_cast<double>(state_.epoch_images) / state_.epoch_seconds : 0;
  const double lr = schedule_.at(std::max<int64_t>(state_.step - 1, 0));
  const int64_t epoch = state_.epoch + 1;
  const EpochRow row{epoch,
                     state_.train_loss,
                     eval.raw.loss,
                     eval.raw.top1,
                     eval.raw.top5,
                     lr,
                     rate,
                     bytes_per_image(),
                     peak_bytes(),
                     state_.epoch_seconds,
                     state_.step,
                     state_.eval_loss_ema,
                     state_.eval_top1_ema,
                     state_.eval_top5_ema};
  if (folder_) folder_->append(row);
  if (watch_) watch_->after_epoch(row, confusion);
  char text[200];
  std::snprintf(text, sizeof text, ": train loss %.4f, eval loss %.4f, top-1 %.2f %%, top-5 %.2f %%, %.1f images/s", state_.train_loss,
                eval.raw.loss, eval.raw.top1, eval.raw.top5, rate);
  say(concat("epoch ", epoch, "/", config_.train.epochs, text));
  if (eval.ema) {
    std::snprintf(text, sizeof text, ": eval loss %.4f, top-1 %.2f %%, top-5 %.2f %%", eval.ema->loss, eval.ema->top1, eval.ema->top5);
    say(concat("epoch ", epoch, "/", config_.train.epochs, ", moving average of the weights", text));
  }
  if (state_.batch >= train_loader_.batches_per_epoch()) {  // else train.steps ended the run here, and a resumed one finishes the epoch
    state_.epoch = epoch;
    state_.batch = state_.epoch_images = 0;
    state_.epoch_loss = state_.epoch_seconds = 0;
  }
  wait_for_writer();
  retry();  // whether the best so far is on the disk is known then
  // A run resumed into another folder has no best checkpoint there, whatever the old one reached.
  const double top1 = eval.judged().top1;
  const bool finite = std::isfinite(eval.judged().loss);
  if (!finite)
    warn(concat("the loss of the evaluation is ", eval.judged().loss, ": these weights are of no use, and not saved as the best"));
  const bool new_best = finite && (top1 > saved_best_ || (folder_ && !std::filesystem::exists(folder_->checkpoint("best"))));
  const bool best = team_.shared("whether the weights are the best so far", new_best ? "yes" : "no") == "yes";
  state_.best_top1 = std::max(state_.best_top1, top1);
  judged_ = top1;
  save(best ? std::vector<std::string>{"best", "last"} : std::vector<std::string>{"last"});
  return true;
}

void Run::take_results(const Evaluations& eval) {
  state_.evaluated_step = state_.step;
  state_.eval_top1 = eval.raw.top1, state_.eval_top5 = eval.raw.top5, state_.eval_loss = eval.raw.loss;
  state_.eval_top1_ema = state_.eval_top5_ema = state_.eval_loss_ema = kNotMeasured;
  if (eval.ema) state_.eval_top1_ema = eval.ema->top1, state_.eval_top5_ema = eval.ema->top5, state_.eval_loss_ema = eval.ema->loss;
  state_.train_loss = state_.epoch_images > 0 ? state_.epoch_loss / static_cast<double>(state_.epoch_images) : kNotMeasured;
}

int Run::stopped_by_signal() {
  const bool saved = team_.shared("whether the checkpoint was saved", save_now("last") ? "yes" : "no") == "yes";
  write_summary();
  const std::string place = concat("stopped by signal ", signal_, " after step ", state_.step);
  if (!saved) return warn(place + " without a checkpoint of this moment"), 1;
  say(concat(place, "; continue with --resume --output ", config_.output));
  return kExitResumable;
}

/// The state goes beside the last good checkpoint, which stays what --resume takes up.
int Run::stopped_by_bad_steps() {
  if (!folder_) {
    save_now("failed");
    return 1;
  }
  wait_for_writer();
  // Weights that are finite are better than none: no step that was not has changed them. `failed` is never taken up by itself.
  const bool first = !std::filesystem::exists(folder_->checkpoint("last")) && first_bad_parameter(model_.params).empty();
  const std::string which = first ? "last" : "failed";
  const bool saved = save_now(which);
  write_summary();
  warn(concat(state_.bad_in_a_row, " steps in a row were not finite; the run stops. ",
              saved ? "Its state is in " + folder_->checkpoint(which) + ". " : "",
              "Try a lower optimizer.lr, a longer schedule.warmup_epochs or train.clip_norm"));
  return 1;
}

/// Ends the live line too: what follows are last words.
RunSummary Run::write_summary() {
  if (progress_) progress_->finish();
  progress_.reset();
  RunSummary s;
  if (state_.evaluated_step >= 0) {
    s.top1 = state_.eval_top1, s.top5 = state_.eval_top5;
    s.eval_loss = state_.eval_loss, s.train_loss = state_.train_loss;
    s.top1_ema = state_.eval_top1_ema, s.top5_ema = state_.eval_top5_ema, s.eval_loss_ema = state_.eval_loss_ema;
  }
  s.epochs = state_.epoch, s.steps = state_.step;
  s.images_per_second = state_.train_seconds > 0 ? static_cast<double>(state_.train_images) / state_.train_seconds : 0;
  s.parameters = plan_.parameters;
  s.activation_bytes_per_image = bytes_per_image();
  const double batch = static_cast<double>(config_.train.batch_size);
  s.exact_activation_bytes_per_image = static_cast<double>(plan_.exact_activation_bytes) / batch;
  s.peak_bytes = finished_before_ ? state_.peak_bytes : peak_bytes();
  s.device = to_string(model_.device.kind), s.storage = config_.storage.name, s.seed = config_.seed;
  if (folder_) folder_->write_summary(s);
  if (watch_) watch_->write_report();
  return s;
}

int Run::finish() {
  if (!settle()) saved_ = false;
  const RunSummary summary = write_summary();
  if (!folder_) return 0;
  if (first_update_done_ && !folder_->complete()) folder_->write_memory(policy_.sites());  // a full disk may have refused it
  if (state_.bad_steps > 0) warn(concat(state_.bad_steps, " steps were skipped because they were not finite"));
  if (state_.bad_samples > 0) warn(concat(state_.bad_samples, " bad samples were replaced"));
  if (is_gpu(model_.device) && first_update_done_)
    folder_->log(
        concat("GPU memory: ", Allocator::of(model_.device).use().reserved, " bytes taken, ", summary.peak_bytes, " in use at most"));
  const std::string text = concat("done: ", to_string(summary, state_.best_top1));
  folder_->log(text);
  std::fprintf(stderr, "%s\n", (text + "; " + config_.output).c_str());
  const bool written = saved_ && folder_->complete();
  if (!written) warn("not everything could be written to " + config_.output);
  return written && (state_.evaluated_step < 0 || std::isfinite(state_.eval_loss)) ? 0 : 1;
}

/// Where rank 0 is lost, so may be whoever reads the stderr of this one: mpirun stands beside rank 0.
static void tell_failure(World& world, const std::string& output, const std::string& what) {
  if (!world.control()->speaks()) return;
  std::fprintf(stderr, "error: %s\n", what.c_str());
  if (!world.leads() && !output.empty())
    std::ofstream(output + "/errors.txt", std::ios::app) << "rank " << world.me().rank << " (" << world.me().host << "): " << what << '\n';
}

int train(RunConfig config, const TrainOptions& options) {
  World world(config.train.rank_timeout);
  config.rank = world.me().rank, config.ranks = world.me().world;
  if (!world.alone()) world.control()->hear_signals([] { return received_signal(); });
  const auto work = [&] {
    check_same_run(world, config);
    use_threads(config);
    const int64_t sharing = share_threads(config, world);
    if (config.data.workers == 0 && sharing > 1)  // what the loader would take for itself, shared
      config.data.workers = std::clamp<int64_t>(omp_get_num_procs() / (4 * sharing), 1, 16);
    try {
      return Run(config, options, world)();
    } catch (const OutOfMemory& e) {
      throw Error(concat(e.what(), "\n", explain_out_of_memory(config)));
    }
  };
  return together(world, work, [&](const std::string& why) { tell_failure(world, config.output, why); });
}

}  // namespace mesa
