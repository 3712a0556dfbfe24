#include "mesa/train/trainer.h"

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <optional>

#include "mesa/train/evaluate.h"
#include "mesa/train/optimizer_setup.h"
#include "mesa/train/signals.h"
#include "run_folder.h"
#include "updater.h"

namespace mesa {
namespace {

/// The checkpoint of a run that ended in bad steps; never taken up by itself.
constexpr const char* kFailed = "failed";

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

std::string default_output(const std::string& name, const ImageConfig& model) {
  char stamp[32];
  const std::time_t t = std::time(nullptr);
  std::strftime(stamp, sizeof stamp, "%Y%m%d-%H%M%S", std::localtime(&t));
  return concat("runs/", stamp, "-", name, "-", model.image_size);
}

/// All parts of one run. The members are made in this order.
class Run {
 public:
  Run(RunConfig config, const TrainOptions& options);
  int operator()();

 private:
  void start();
  void take_up(const std::string& checkpoint);
  void open_folder();
  void introduce();
  int loop();
  bool train_epoch();
  SentBatch next_batch();
  void look_ahead(const cuda::Mark& after);
  void report(const UpdateResult& result, double seconds);
  void show(const UpdateResult& result);
  void add_data_shares(IntervalRow& row);
  void report_saturation();
  bool end_epoch();
  void take_results(const Evaluations& eval);
  bool save(const std::string& which);
  int stopped_by_signal();
  int stopped_by_bad_steps();
  int finish();
  RunSummary write_summary();
  void say(const std::string& text);
  void warn(const std::string& text);
  /// The peak of this process and of those that the run was resumed from.
  int64_t peak_bytes() const { return std::max(state_.peak_bytes, Allocator::of(model_.device).use().peak); }
  int64_t bad_samples() const { return bad_samples_before_ + train_loader_.skipped(); }
  double bytes_per_image() const {
    const int64_t bytes = updater_.activation_bytes() > 0 ? updater_.activation_bytes() : plan_.activation_bytes;
    return static_cast<double>(bytes) / static_cast<double>(config_.train.batch_size);
  }
  bool steps_used_up() const { return config_.train.steps > 0 && state_.step >= config_.train.steps; }
  bool done() const { return state_.epoch >= config_.train.epochs || (steps_used_up() && state_.evaluated_step == state_.step); }

  RunConfig config_;
  TrainOptions options_;
  std::string resume_;
  DatasetPair data_;
  NetConfig net_;
  TransformOptions transform_;
  Plan plan_;
  Loader train_loader_, eval_loader_;
  BuiltModel model_;
  StoragePolicy policy_;
  std::unique_ptr<Optimizer> optimizer_;
  std::unique_ptr<Ema> ema_;  // or null
  int64_t updates_per_epoch_;
  Schedule schedule_;
  Updater updater_;
  TrainingState state_;
  std::optional<SentBatch> ahead_;
  int64_t taken_ = 0;  // batches of this epoch
  std::unique_ptr<RunFolder> folder_;
  std::unique_ptr<Progress> progress_;
  std::string changes_;  // against the checkpoint
  std::string start_;    // what was begun with
  bool finished_before_ = false, saved_ = true, memory_written_ = false, saturation_told_ = false;
  int64_t bad_samples_before_ = 0;
  size_t reported_skips_ = 0, reported_left_out_ = 0;
  double last_wait_ = 0;
  StageTimes last_stages_;
  double stages_since_ = 0;
};

Run::Run(RunConfig config, const TrainOptions& options)
    : config_(std::move(config)),
      options_(options),
      data_(make_training_data(config_, model_config(config_, known_classes(config_)).input())),
      net_(model_config(config_, data_.train->classes())),
      transform_(make_transform(config_, net_.input())),
      plan_(plan_run(config_, net_)),
      train_loader_(data_.train, transform_, make_loader_options(config_, true, choose_device(config_.device))),
      eval_loader_(data_.test, transform_, make_loader_options(config_, false, choose_device(config_.device))),
      model_(config_, net_, choose_device(config_.device)),
      policy_(make_policy(config_.storage)),
      optimizer_((model_.params.allocate_gradients(), make_optimizer(config_, model_.params))),
      ema_(make_ema(config_, model_.params)),
      updates_per_epoch_((train_loader_.batches_per_epoch() + config_.train.accumulation - 1) / config_.train.accumulation),
      schedule_(make_schedule(config_, updates_per_epoch_)),
      updater_(config_, model_, policy_, *optimizer_, ema_.get(), schedule_, transform_) {
  config_.model.classes = net_.input().classes;  // from here on fixed: config.yaml and the checkpoints say it
  if (config_.output.empty() && options_.resume == "auto")
    throw UsageError("--resume needs to know the run: give its folder with --output (or `output` in the config)");
  if (config_.output.empty()) config_.output = default_output(config_.model.name, net_.input());
  resume_ = find_checkpoint(options_.resume, config_.output);
  if (!resume_.empty())
    take_up(resume_);
  else if (!config_.train.weights.empty())
    start();
  open_folder();
}

void Run::start() {
  try {
    start_ = start_from_weights(model_.params, config_.train.weights);
    if (ema_) ema_->restart();
  } catch (const Error& e) {
    config_.refuse("train.weights", e.what());
  }
}

void Run::take_up(const std::string& checkpoint) {
  const LoadedRun loaded = load_checkpoint(checkpoint, config_, model_.params, *optimizer_, policy_, ema_.get());
  changes_ = describe_changes(loaded, config_);
  if (loaded.average_begins) start_ = "the checkpoint has no moving average of the weights; it begins with the present ones";
  state_ = loaded.state;
  bad_samples_before_ = state_.bad_samples;
  finished_before_ = done();
  // Whoever resumes after too many bad steps has changed something and gets the full number again.
  if (state_.bad_in_a_row >= config_.train.max_bad_steps) state_.bad_in_a_row = 0;
}

void Run::open_folder() {
  std::optional<LogPosition> position;
  if (!resume_.empty() && lies_in(resume_, config_.output)) {
    // A limit of steps ended the run within an epoch: its row stands as long as the run does not go on.
    const bool row_within_epoch = finished_before_ && state_.batch > 0;
    position = LogPosition{state_.epoch + (row_within_epoch ? 1 : 0), state_.step};
  }
  folder_ = std::make_unique<RunFolder>(config_, position, options_.resume == "auto" && resume_.empty());
}

void Run::say(const std::string& text) {
  folder_->log(text);
  if (progress_)
    progress_->print(text);
  else if (!options_.quiet)
    std::fprintf(stderr, "%s\n", text.c_str());
}

void Run::warn(const std::string& text) {
  folder_->warn(text);
  if (progress_)
    progress_->print("warning: " + text);
  else
    std::fprintf(stderr, "warning: %s\n", text.c_str());
}

void Run::introduce() {
  const int64_t batch = config_.train.batch_size;
  say(concat("model: ", plan_.parameters, " parameters, ", config_.train.precision, ", ", omp_get_max_threads(), " threads, storage ",
             config_.storage.name, ": ", format_bytes(plan_.activation_bytes / batch), " kept per image, ",
             format_bytes(plan_.exact_activation_bytes / batch), " in exact storage"));
  say("device: " + describe_device(config_.device, model_.device));
  say("optimizer: " + describe_optimizer(config_, model_.params));
  say(concat("data: ", data_.train->size(), " training and ", data_.test->size(), " test images of ", data_.train->classes(),
             " classes; output: ", config_.output));
  if (config_.distill.kind != "none")
    say(concat("teacher: ", config_.distill.teacher, ", ", config_.distill.kind, " distillation with a share of ", config_.distill.alpha));
  if (!resume_.empty())
    say(concat("resumed from ", resume_, " after epoch ", state_.epoch, ", step ", state_.step));
  else if (!options_.resume.empty())
    say(concat("nothing to resume in ", config_.output, "; a fresh run begins"));
  if (!start_.empty()) say(start_);
  if (!changes_.empty()) warn("this run goes on with other settings than the checkpoint's: " + changes_);
}

int Run::operator()() {
  introduce();
  if (finished_before_) {
    say(concat("the run is finished already; raise train.", state_.epoch >= config_.train.epochs ? "epochs" : "steps", " to train on"));
    return finish();
  }
  Allocator::of(model_.device).reset_peak();  // reading a checkpoint is no part of training
  if (!options_.quiet) progress_ = std::make_unique<Progress>(schedule_.total_steps, state_.step, config_.train.log_interval);
  const TrainingState start = state_;
  stages_since_ = now();
  try {
    return loop();
  } catch (const std::exception& e) {
    // Such as a damaged picture after hours: what was trained is kept, and can be resumed once the cause is mended.
    const std::string place = concat("epoch ", state_.epoch + 1, ", step ", state_.step);
    folder_->warn(concat("error at ", place, ": ", e.what()));
    if (progress_) progress_->finish();
    progress_.reset();
    const bool kept = state_.step > start.step && save("last");
    const std::string what = concat(e.what(), " (at ", place, kept ? "; the state before it is saved: continue with --resume)" : ")");
    if (dynamic_cast<const OutOfMemory*>(&e)) throw OutOfMemory(what);
    throw Error(what);
  }
}

int Run::loop() {
  while (!done()) {
    if (!train_epoch()) return received_signal() != 0 ? stopped_by_signal() : stopped_by_bad_steps();
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
    if (received_signal() != 0) return false;
    const double start = now();
    const TrainingState before = state_;
    try {
      const int64_t count = std::min(config_.train.accumulation, batches - state_.batch);  // fewer at the end of an epoch
      const UpdateResult result = updater_(
          count, [this] { return next_batch(); }, [this](const cuda::Mark& after) { look_ahead(after); }, state_);
      state_.batch += count;
      report(result, now() - start);
    } catch (const Error&) {
      state_ = before;
      policy_.roll_back();  // ranges and running statistics have seen the batches of an update that does not count
      model_.params.restore_buffers();
      throw;
    }
    if (state_.bad_in_a_row >= config_.train.max_bad_steps) return false;
    const int64_t every = config_.train.checkpoint_interval;
    if (every > 0 && state_.step % every == 0 && state_.batch < batches) save("last");
  }
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
  state_.bad_samples = bad_samples();
  if (!memory_written_) folder_->write_memory(policy_.sites());
  memory_written_ = true;
  if (!result.bad.empty()) {
    warn(concat("step ", state_.step, " of epoch ", state_.epoch + 1, " is skipped: ", result.bad));
  } else {
    const double sum = result.loss * static_cast<double>(result.images);
    state_.epoch_loss += sum, state_.interval_loss += sum;
    state_.epoch_images += result.images, state_.interval_images += result.images;
  }
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

/// The live line, and each log_interval steps a line of metrics.jsonl.
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
  if (state_.step % config_.train.log_interval != 0) return;
  IntervalRow row{state_.step, state_.epoch + 1, loss, result.lr, result.gradient_norm, rate, wait, bytes_per_image(),
                  peak_bytes(), state_.bad_steps, state_.bad_samples};
  add_data_shares(row);
  folder_->append(row);
  state_.interval_images = 0;
  state_.interval_loss = state_.interval_seconds = state_.interval_wait = 0;
}

/// The epoch's saturation goes into memory.csv; a warning about the worst site comes once, since it would be much the same every epoch.
void Run::report_saturation() {
  constexpr double kWorthAWarning = 0.05;
  folder_->write_memory(policy_.sites());
  const auto share = [](const SiteRecord& s) {
    return s.elements > 0 ? static_cast<double>(s.saturated) / static_cast<double>(s.elements) : 0;
  };
  SiteRecord worst;
  for (const SiteRecord& site : policy_.sites())
    if (share(site) > share(worst)) worst = site;
  if (!saturation_told_ && share(worst) > kWorthAWarning) {
    warn(concat(std::lround(100 * share(worst)), " % of the elements of ", worst.site.name(),
                " lay outside its running range in this epoch, more than at any other site (memory.csv); range: current would keep them"));
    saturation_told_ = true;
  }
  policy_.reset_counts();
}

/// Evaluates, logs and saves. False if a signal interrupts the evaluation, which is then done again after the resume.
bool Run::end_epoch() {
  const Evaluations eval = evaluate_all(model_, ema_.get(), eval_loader_, transform_, [] { return received_signal() != 0; });
  if (!eval.complete()) return false;
  for (; reported_left_out_ < eval_loader_.skipped_samples().size(); ++reported_left_out_)
    warn("a bad test sample is left out: " + eval_loader_.skipped_samples()[reported_left_out_]);
  take_results(eval);
  const double rate = state_.epoch_seconds > 0 ? static_cast<double>(state_.epoch_images) / state_.epoch_seconds : 0;
  const double lr = schedule_.at(std::max<int64_t>(state_.step - 1, 0));
  const int64_t epoch = state_.epoch + 1;
  folder_->append(EpochRow{epoch, state_.train_loss, eval.raw.loss, eval.raw.top1, eval.raw.top5, lr, rate, bytes_per_image(), peak_bytes(),
                           state_.epoch_seconds, state_.eval_loss_ema, state_.eval_top1_ema, state_.eval_top5_ema});
  report_saturation();
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
  // A run resumed into another folder has no best checkpoint there, whatever the old one reached.
  const double top1 = eval.judged().top1;
  const bool best = top1 > state_.best_top1 || !std::filesystem::exists(folder_->checkpoint("best"));
  state_.best_top1 = std::max(state_.best_top1, top1);
  const bool best_saved = !best || save("best");
  saved_ = save("last") && best_saved;
  return true;
}

void Run::take_results(const Evaluations& eval) {
  state_.evaluated_step = state_.step;
  state_.eval_top1 = eval.raw.top1, state_.eval_top5 = eval.raw.top5, state_.eval_loss = eval.raw.loss;
  state_.eval_top1_ema = state_.eval_top5_ema = state_.eval_loss_ema = kNotMeasured;
  if (eval.ema) state_.eval_top1_ema = eval.ema->top1, state_.eval_top5_ema = eval.ema->top5, state_.eval_loss_ema = eval.ema->loss;
  state_.train_loss = state_.epoch_images > 0 ? state_.epoch_loss / static_cast<double>(state_.epoch_images) : kNotMeasured;
}

/// A failure keeps the previous checkpoint and does not stop training. Neither does a state that nobody could resume replace a good one.
bool Run::save(const std::string& which) {
  const std::string bad = which == kFailed ? "" : first_bad_parameter(model_.params);
  if (!bad.empty()) {
    warn(concat("the checkpoint '", which, "' is not replaced: the weights are not finite, first in ", bad));
    return false;
  }
  state_.peak_bytes = peak_bytes();
  try {
    save_checkpoint(folder_->checkpoint(which), config_, data_.train->class_names(), model_.params, *optimizer_, policy_, state_,
                    ema_.get());
    return true;
  } catch (const std::exception& e) {
    warn(concat("the checkpoint '", which, "' could not be written: ", e.what()));
    return false;
  }
}

int Run::stopped_by_signal() {
  const bool saved = save("last");
  write_summary();
  const std::string place = concat("stopped by signal ", received_signal(), " after step ", state_.step);
  if (!saved) return warn(place + " without a checkpoint of this moment"), 1;
  say(concat(place, "; continue with --resume --output ", config_.output));
  return kExitResumable;
}

/// The state goes beside the last good checkpoint, which stays what --resume takes up.
int Run::stopped_by_bad_steps() {
  const bool first = !std::filesystem::exists(folder_->checkpoint("last")) && first_bad_parameter(model_.params).empty();
  const std::string which = first ? "last" : kFailed;
  const bool saved = save(which);
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
  folder_->write_summary(s);
  return s;
}

int Run::finish() {
  const RunSummary summary = write_summary();
  if (memory_written_) folder_->write_memory(policy_.sites());  // once more, in case a full disk refused it
  if (state_.bad_steps > 0) warn(concat(state_.bad_steps, " steps were skipped because they were not finite"));
  if (state_.bad_samples > 0) warn(concat(state_.bad_samples, " bad samples were replaced"));
  const std::string text = concat("done: ", to_string(summary, state_.best_top1));
  folder_->log(text);
  std::fprintf(stderr, "%s\n", (text + "; " + config_.output).c_str());
  if (saved_ && folder_->complete()) return 0;
  warn("not everything could be written to " + config_.output);
  return 1;
}

}  // namespace

int train(const RunConfig& config, const TrainOptions& options) {
  choose_device(config.device);
  use_threads(config);
  try {
    return Run(config, options)();
  } catch (const OutOfMemory& e) {
    throw Error(concat(e.what(), "\n", explain_out_of_memory(config)));
  }
}

}  // namespace mesa
