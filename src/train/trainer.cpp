#include "mesa/train/trainer.h"

#include <omp.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <unistd.h>

#include "mesa/train/evaluate.h"
#include "mesa/train/signals.h"
#include "run_folder.h"
#include "updater.h"

namespace mesa {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

std::string default_output(const VitConfig& model) {
  char stamp[32];
  const std::time_t t = std::time(nullptr);
  std::strftime(stamp, sizeof stamp, "%Y%m%d-%H%M%S", std::localtime(&t));
  return concat("runs/", stamp, "-vit-", model.width, "x", model.depth, "-", model.image_size);
}

/// The checkpoint that --resume means, or "" for a fresh start. A damaged one is passed over with a word.
std::string find_resume(const std::string& wish, const std::string& output) {
  if (wish.empty()) return "";
  if (wish != "auto") return resolve_checkpoint(wish, "last");
  std::string rejected;
  for (const char* which : {"last", "best"}) {
    const std::string folder = output + "/checkpoints/" + which;
    if (output.empty() || !recover_folder(folder)) continue;
    try {
      verify_folder(folder);
      return folder;
    } catch (const Error& e) {
      std::fprintf(stderr, "warning: %s cannot be used: %s\n", folder.c_str(), e.what());
      rejected = folder;
    }
  }
  check(rejected.empty(), "no checkpoint of ", output, " is whole; start again with another --output");
  return "";
}

/// All parts of one run. The members are made in this order.
class Run {
 public:
  Run(RunConfig config, const TrainOptions& options);
  int operator()();

 private:
  Schedule make_schedule() const;
  bool train_epoch();
  void report(const UpdateResult& result, const std::vector<Batch>& batches, double seconds);
  void end_epoch();
  bool save(const std::string& which);
  int finish(int code, const std::string& text);
  void say(const std::string& text);
  double images_per_second() const { return state_.train_seconds > 0 ? static_cast<double>(state_.train_images) / state_.train_seconds : 0; }
  double bytes_per_image() const { return static_cast<double>(updater_.activation_bytes()) / static_cast<double>(config_.train.batch_size); }
  bool done() const { return state_.epoch >= config_.train.epochs || (config_.train.steps > 0 && state_.step >= config_.train.steps); }

  RunConfig config_;
  TrainOptions options_;
  std::string resume_;
  VitConfig vit_;
  DatasetPair data_;
  TransformOptions transform_;
  Plan plan_;
  Loader train_loader_, eval_loader_;
  BuiltModel model_;
  StoragePolicy policy_;
  AdamW optimizer_;
  int64_t updates_per_epoch_;
  Schedule schedule_;
  Updater updater_;
  TrainingState state_;
  std::unique_ptr<RunFolder> folder_;
  std::unique_ptr<Progress> progress_;
  double interval_loss_ = 0, interval_seconds_ = 0, interval_wait_ = 0;
  int64_t interval_steps_ = 0, interval_images_ = 0, reported_skips_ = 0;
  double last_wait_ = 0;
  EvalResult eval_;
  double train_loss_ = kNotMeasured;
};

AdamWConfig adamw_config(const OptimizerConfig& o) { return {o.lr, o.weight_decay, o.beta1, o.beta2, o.eps}; }

Run::Run(RunConfig config, const TrainOptions& options)
    : config_(std::move(config)),
      options_(options),
      vit_(model_config(config_, known_classes(config_))),
      data_(make_datasets(config_, vit_)),
      transform_(make_transform(config_, vit_ = model_config(config_, data_.train->classes()))),
      plan_(plan_run(config_, vit_)),
      train_loader_(data_.train, transform_, make_loader_options(config_, true)),
      eval_loader_(data_.test, transform_, make_loader_options(config_, false)),
      model_(config_, vit_),
      policy_(make_policy(config_.storage)),
      optimizer_((model_.params.allocate_gradients(), model_.params.params()), adamw_config(config_.optimizer)),
      updates_per_epoch_((train_loader_.batches_per_epoch() + config_.train.accumulation - 1) / config_.train.accumulation),
      schedule_(make_schedule()),
      updater_(config_, model_, policy_, optimizer_, schedule_, transform_) {
  if (vit_.classes < data_.train->classes())
    config_.refuse("model.classes", "the data has ", data_.train->classes(), " classes, more than the model's ", vit_.classes);
  if (config_.output.empty()) config_.output = default_output(vit_);
  resume_ = find_resume(options_.resume, config_.output);
  if (!resume_.empty()) state_ = load_checkpoint(resume_, model_.params, optimizer_, policy_);
  folder_ = std::make_unique<RunFolder>(config_, !resume_.empty(), state_, state_.step);
  // Fixed from here on: the size of the model decides how the checkpoint is read back.
  config_.model.classes = vit_.classes;
}

Schedule Run::make_schedule() const {
  Schedule s;
  s.kind = config_.schedule.name == "constant" ? Schedule::Kind::constant : Schedule::Kind::cosine;
  s.lr = config_.optimizer.lr;
  s.warmup_lr = config_.schedule.warmup_lr;
  s.min_lr = config_.schedule.min_lr;
  s.warmup_steps = std::llround(config_.schedule.warmup_epochs * static_cast<double>(updates_per_epoch_));
  s.total_steps = config_.train.epochs * updates_per_epoch_;
  if (config_.train.steps > 0) s.total_steps = std::min(s.total_steps, config_.train.steps);
  return s;
}

void Run::say(const std::string& text) {
  folder_->log(text);
  if (progress_) progress_->print(text);
  else std::fprintf(stderr, "%s\n", text.c_str());
}

int Run::operator()() {
  const SignalGuard signals;
  say(concat("model: ", plan_.parameters, " parameters, ", to_string(compute_dtype(config_)), ", ", omp_get_max_threads(), " threads, storage ",
             config_.storage.name, ": ", format_bytes(plan_.activation_bytes / config_.train.batch_size), " kept per image, ",
             format_bytes(plan_.exact_activation_bytes / config_.train.batch_size), " in exact storage"));
  say(concat("data: ", data_.train->size(), " training and ", data_.test->size(), " test images of ", data_.train->classes(), " classes; output: ",
             config_.output));
  if (!resume_.empty()) say(concat("resumed from ", resume_, " at epoch ", state_.epoch, ", step ", state_.step));
  if (!options_.quiet) progress_ = std::make_unique<Progress>(schedule_.total_steps, state_.step, config_.train.log_interval);
  while (!done() || state_.batch > 0) {
    if (!train_epoch()) {
      const bool saved = save("last");
      if (SignalGuard::received() == 0) return finish(1, concat(state_.bad_in_a_row, " steps in a row were not finite"));
      return finish(saved ? kExitResumable : 1, "stopped by a signal; continue with --resume");
    }
    end_epoch();
    if (!eval_.complete) {
      const bool saved = save("last");
      return finish(saved ? kExitResumable : 1, "stopped by a signal during evaluation; continue with --resume");
    }
  }
  return finish(0, "done");
}

/// The rest of the current epoch. False if a signal or too many bad steps ended it early, between two updates.
bool Run::train_epoch() {
  const int64_t batches = train_loader_.batches_per_epoch();
  if (state_.batch < batches) train_loader_.start_epoch(state_.epoch, state_.batch);
  while (state_.batch < batches && !(config_.train.steps > 0 && state_.step >= config_.train.steps)) {
    if (SignalGuard::received() != 0) return false;
    const double start = now();
    std::vector<Batch> group;
    while (static_cast<int64_t>(group.size()) < config_.train.accumulation) {
      auto batch = train_loader_.next();
      if (!batch) break;
      group.push_back(std::move(*batch));
    }
    if (group.empty()) break;
    const UpdateResult result = updater_(group, state_);
    state_.batch += static_cast<int64_t>(group.size());
    report(result, group, now() - start);
    if (state_.bad_in_a_row > 0 && state_.bad_in_a_row >= config_.train.max_bad_steps) return false;
    const int64_t every = config_.train.checkpoint_interval;
    if (every > 0 && state_.step % every == 0 && state_.batch < batches) save("last");
  }
  return true;
}

void Run::report(const UpdateResult& result, const std::vector<Batch>& batches, double seconds) {
  state_.train_seconds += seconds;
  state_.epoch_seconds += seconds;
  state_.train_images += result.images;
  if (state_.step == 1) folder_->write_memory(policy_.sites());
  if (!result.bad.empty()) {
    say(concat("warning: step ", state_.step, " of epoch ", state_.epoch + 1, " is skipped: ", result.bad, " (samples ", batches[0].sample_indices[0],
               ", ...)"));
  } else {
    state_.epoch_loss += result.loss * static_cast<double>(result.images);
    state_.epoch_images += result.images;
    interval_loss_ += result.loss * static_cast<double>(result.images);
    interval_images_ += result.images;
  }
  for (; reported_skips_ < static_cast<int64_t>(train_loader_.skipped_samples().size()); ++reported_skips_)
    say("warning: bad sample skipped: " + train_loader_.skipped_samples()[reported_skips_]);
  interval_seconds_ += seconds;
  interval_wait_ += train_loader_.wait_seconds() - last_wait_;
  last_wait_ = train_loader_.wait_seconds();
  ++interval_steps_;
  const double n = static_cast<double>(interval_images_), wait = interval_seconds_ > 0 ? interval_wait_ / interval_seconds_ : 0;
  const double rate = interval_seconds_ > 0 ? n / interval_seconds_ : 0, loss = n > 0 ? interval_loss_ / n : kNotMeasured;
  if (progress_) {
    ProgressState p;
    p.epoch = state_.epoch + 1, p.epochs = config_.train.epochs;
    p.step = (state_.batch + config_.train.accumulation - 1) / config_.train.accumulation, p.steps = updates_per_epoch_;
    p.loss = loss, p.lr = result.lr, p.images_per_second = rate, p.data_wait = wait;
    p.activation_bytes = static_cast<double>(updater_.activation_bytes());
    progress_->update(p);
  }
  if (interval_steps_ < config_.train.log_interval) return;
  folder_->append(IntervalRow{state_.step, state_.epoch + 1, loss, result.lr, result.gradient_norm, rate, wait, bytes_per_image(),
                              Allocator::of(kCpu).use().peak, state_.bad_steps, train_loader_.skipped()});
  interval_steps_ = interval_images_ = 0;
  interval_loss_ = interval_seconds_ = interval_wait_ = 0;
}

void Run::end_epoch() {
  eval_ = evaluate(model_.net, eval_loader_, transform_, [] { return SignalGuard::received() != 0; });
  if (!eval_.complete) return;  // evaluated again after the resume
  train_loss_ = state_.epoch_images > 0 ? state_.epoch_loss / static_cast<double>(state_.epoch_images) : kNotMeasured;
  const double rate = state_.epoch_seconds > 0 ? static_cast<double>(state_.epoch_images) / state_.epoch_seconds : 0;
  const double lr = schedule_.at(std::max<int64_t>(state_.step - 1, 0));
  ++state_.epoch;
  folder_->append(EpochRow{state_.epoch, train_loss_, eval_.loss, eval_.top1, eval_.top5, lr, rate, bytes_per_image(),
                           Allocator::of(kCpu).use().peak, state_.epoch_seconds});
  char text[200];
  std::snprintf(text, sizeof text, "epoch %lld/%lld: train loss %.4f, eval loss %.4f, top-1 %.2f %%, top-5 %.2f %%, %.1f images/s",
                static_cast<long long>(state_.epoch), static_cast<long long>(config_.train.epochs), train_loss_, eval_.loss, eval_.top1, eval_.top5, rate);
  say(text);
  state_.batch = state_.epoch_images = 0;
  state_.epoch_loss = state_.epoch_seconds = 0;
  const bool best = eval_.top1 > state_.best_top1;
  if (best) state_.best_top1 = eval_.top1;
  if (best) save("best");
  save("last");
}

/// A failure keeps the previous checkpoint and does not stop training.
bool Run::save(const std::string& which) {
  try {
    save_checkpoint(folder_->checkpoint(which), config_, data_.train->class_names(), model_.params, optimizer_, policy_, state_);
    return true;
  } catch (const Error& e) {
    say(concat("warning: the checkpoint '", which, "' could not be written: ", e.what()));
    return false;
  }
}

int Run::finish(int code, const std::string& text) {
  if (progress_) progress_->finish();
  progress_.reset();
  RunSummary s;
  const bool evaluated = eval_.complete && eval_.images > 0;
  if (evaluated) s.top1 = eval_.top1, s.top5 = eval_.top5, s.eval_loss = eval_.loss;
  s.train_loss = train_loss_;
  s.epochs = state_.epoch, s.steps = state_.step;
  s.images_per_second = images_per_second();
  s.parameters = plan_.parameters;
  s.activation_bytes_per_image = updater_.activation_bytes() > 0 ? bytes_per_image()
                                 : static_cast<double>(plan_.activation_bytes) / static_cast<double>(config_.train.batch_size);
  s.exact_activation_bytes_per_image = static_cast<double>(plan_.exact_activation_bytes) / static_cast<double>(config_.train.batch_size);
  s.peak_bytes = Allocator::of(kCpu).use().peak;
  s.device = "cpu", s.storage = config_.storage.name, s.seed = config_.seed;
  folder_->write_summary(s);
  if (state_.bad_steps > 0) say(concat("warning: ", state_.bad_steps, " steps were skipped because they were not finite"));
  if (train_loader_.skipped() > 0) say(concat("warning: ", train_loader_.skipped(), " bad samples were replaced"));
  char line[320];
  const double kept = s.activation_bytes_per_image, exact = s.exact_activation_bytes_per_image;
  std::snprintf(line, sizeof line, "%s: top-1 %.2f %%, %.1f images/s, %s kept per image, %.1f times less than exact storage (%s); %s",
                text.c_str(), evaluated ? eval_.top1 : state_.best_top1, s.images_per_second, format_bytes(std::llround(kept)).c_str(),
                kept > 0 ? exact / kept : 0.0, format_bytes(std::llround(exact)).c_str(), config_.output.c_str());
  say(line);
  return code;
}

void use_threads(const RunConfig& config) {
  if (config.train.threads > 0) omp_set_num_threads(static_cast<int>(config.train.threads));
}

}  // namespace

int train(RunConfig config, const TrainOptions& options) {
  choose_device(config.device);
  use_threads(config);
  return Run(std::move(config), options)();
}

std::string dry_run(const RunConfig& config) {
  choose_device(config.device);
  const VitConfig model = model_config(config, known_classes(config));
  compute_dtype(config);
  make_transform(config, model);
  return concat(to_yaml(config), "\n", format_plan(plan_run(config, model), config.train.batch_size));
}

}  // namespace mesa
