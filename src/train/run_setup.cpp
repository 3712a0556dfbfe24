// How a run begins: fresh, from the weights of another, or where a checkpoint stands.
#include <omp.h>

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <filesystem>

#include "checkpoint_files.h"
#include "mesa/train/lora.h"
#include "mesa/train/version.h"
#include "run.h"

namespace mesa {

static std::string default_output(const std::string& name, const ImageConfig& model) {
  char stamp[32];
  const std::time_t t = std::time(nullptr);
  std::strftime(stamp, sizeof stamp, "%Y%m%d-%H%M%S", std::localtime(&t));
  return concat("runs/", stamp, "-", name, "-", model.image_size);
}

/// The plan, and on a GPU the memory for it before anything else takes some, but for what NCCL keeps. All ranks must call it.
static Plan plan_and_reserve(const RunConfig& config, const NetConfig& model, Team& team) {
  const Plan plan = plan_run(config, model);
  team.shared("that all have opened their data", "");  // which may take one much longer than a collective waits for it
  rehearse_collectives(config, team.communicator());
  if (const Device device = choose_device(config.device); is_gpu(device)) reserve_memory(plan, device);
  return plan;
}

Run::Run(RunConfig config, const TrainOptions& options, World& world)
    : config_(std::move(config)),
      options_(options),
      team_(world, choose_device(config_.device)),
      data_(make_training_data(config_, model_config(config_, known_classes(config_)).input())),
      net_(model_config(config_, data_.train->classes())),
      transform_(make_transform(config_, net_.input())),
      plan_(plan_and_reserve(config_, net_, team_)),
      train_loader_(data_.train, transform_, make_loader_options(config_, true, choose_device(config_.device))),
      eval_loader_(data_.test, transform_, make_loader_options(config_, false, choose_device(config_.device))),
      predictions_(data_.test->size(), net_.input().classes, data_.test->class_names()),
      model_(config_, net_, choose_device(config_.device)),
      policy_(make_policy(config_.storage)),
      sync_(share_gradients(config_, model_.params, team_.communicator())),
      optimizer_(make_optimizer(config_, model_.params, shard_of(sync_.get(), team_.communicator()))),
      ema_(make_ema(config_, model_.params)),
      updates_per_epoch_((train_loader_.batches_per_epoch() + config_.train.accumulation - 1) / config_.train.accumulation),
      schedule_(make_schedule(config_, updates_per_epoch_)),
      updater_(config_, model_, policy_, sync_.get(), *optimizer_, ema_.get(), schedule_, transform_, team_, memory_of_records(plan_)) {
  updater_.count_bad_samples([this] { return train_loader_.skipped(); });
  state_.ranks = config_.ranks;
  config_.model.classes = net_.input().classes;  // from here on fixed: config.yaml and the checkpoints say it
  if (config_.output.empty() && options_.resume == "auto")
    throw UsageError("--resume needs to know the run: give its folder with --output (or `output` in the config)");
  if (config_.output.empty())
    config_.output =
        team_.shared("the output's name", team_.leads() ? claim_folder(default_output(config_.model.name, net_.input())) : std::string());
  if (team_.leads() && std::filesystem::exists(config_.output)) lock_ = std::make_unique<FolderLock>(config_.output);
  // One rank looks and mends what a crash left; the others take up what it found, so that none sees a folder that is being renamed.
  const auto reject = [this](const std::string& why) {
    std::fprintf(stderr, "warning: %s\n", why.c_str());
    rejected_.push_back(why);
  };
  resume_ = team_.shared("the checkpoint to resume", team_.leads() ? find_checkpoint(options_.resume, config_.output, reject) : "");
  if (!resume_.empty())
    take_up(resume_);
  else if (!config_.train.weights.empty())
    start();
  check_alike(world);
  check_histograms(config_, model_.params, plan_);
  if (team_.leads()) open_folder();
  if (config_.train.autotune && is_gpu(model_.device))
    products_ = std::make_unique<ProductTuning>(config_.output, resume_, team_.rank(), [this](const std::string& text) { warn(text); });
}

void Run::start() {
  try {
    start_ = start_from_weights(model_.params, config_.train.weights);
    const std::string bad = first_bad_parameter(model_.params);
    if (!bad.empty()) throw Error(concat(config_.train.weights, ": ", bad, " holds NaN or infinity"));
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
  optimizer_hash_ = loaded.optimizer_hash;
  move_to_batch(loaded.config.train.batch_size * loaded.state.ranks);
  bad_samples_before_ = state_.bad_samples;
  finished_before_ = done();
  // Whoever resumes after too many bad steps has changed something and gets the full number again.
  if (state_.bad_in_a_row >= config_.train.max_bad_steps) state_.bad_in_a_row = 0;
}

/// A checkpoint of another number of ranks counts batches of another size: the epoch goes on with the batch that holds its next image.
void Run::move_to_batch(int64_t images_then) {
  const int64_t images = state_.batch * images_then, now = config_.train.batch_size * config_.ranks;
  state_.batch = images / now;
  if (images % now != 0)
    start_ = concat("batches of ", now, " images in place of ", images_then, ": ", images % now, " images of this epoch are seen twice");
  state_.ranks = config_.ranks;
}

/// Ranks that do not begin with the same numbers at the same place would go on side by side and never meet.
void Run::check_alike(World& world) {
  if (team_.alone()) return;
  uint64_t hash = mix64(static_cast<uint64_t>(state_.step) ^ optimizer_hash_);
  const auto take = [&](const Tensor& tensor) {
    const Tensor host = to(tensor, kCpu);
    hash = mix64(hash ^ hash_name({static_cast<const char*>(host.raw()), static_cast<size_t>(host.bytes())}));
  };
  for (const Param& param : model_.params.params()) take(param.value);
  for (const ModelBuffer& buffer : model_.params.buffers()) take(buffer.value);
  if (ema_)
    for (const auto& [name, average] : ema_->state()) take(average);
  check_same(world, "what they begin with (do all see the same files?)", concat("weights and state ", hash, " at step ", state_.step));
}

void Run::open_folder() {
  std::optional<LogPosition> position;
  if (!resume_.empty() && lies_in(resume_, config_.output)) {
    // A limit of steps ended the run within an epoch: its row stands as long as the run does not go on.
    const bool row_within_epoch = finished_before_ && state_.batch > 0;
    position = LogPosition{state_.epoch + (row_within_epoch ? 1 : 0), state_.step};
  }
  if (!lock_) lock_ = std::make_unique<FolderLock>(config_.output);
  folder_ = std::make_unique<RunFolder>(config_, position, options_.resume == "auto" && resume_.empty());
  for (const std::string& why : rejected_) folder_->warn(why);
  if (position) state_.branch = branch_after(resume_, config_.output + "/checkpoints");
  writer_ = std::make_unique<CheckpointWriter>(config_.output + "/checkpoints", config_.train.keep, resume_);
  saved_best_ = number_of(folder_->checkpoint("best"), "best_top1", -1);
  const RunWatch::Parts parts{config_, *folder_, policy_, model_.params, *data_.train, model_.device};
  watch_ = std::make_unique<RunWatch>(parts, position, [this](const std::string& text) { warn(text); });
}

void Run::say(const std::string& text) {
  if (!team_.leads()) return;
  folder_->log(text);
  if (progress_)
    progress_->print(text);
  else if (!options_.quiet)
    std::fprintf(stderr, "%s\n", text.c_str());
}

void Run::warn(const std::string& text) {
  if (!team_.leads()) {
    std::fprintf(stderr, "warning: rank %lld: %s\n", static_cast<long long>(team_.rank()), text.c_str());
    return;
  }
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
  if (!team_.alone()) say(concat("ranks: ", team_.size(), ", ", batch * team_.size(), " images a batch"));
  if (config_.lora.rank > 0) {
    say("LoRA: " + describe_lora(config_, model_.params));
    if (config_.train.weights.empty() && resume_.empty())
      warn("lora.rank is set but train.weights is empty, so that what LoRA freezes keeps its random first values");
  }
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

}  // namespace mesa
