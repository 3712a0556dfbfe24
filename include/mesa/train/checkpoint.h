// What a run needs to go on, in one verified folder: weights under timm's names, and the training state beside them.
#pragma once
#include <functional>
#include <limits>

#include "mesa/nn/builder.h"
#include "mesa/optim/ema.h"
#include "mesa/optim/optimizer.h"
#include "mesa/storage/policy.h"
#include "mesa/train/config.h"
#include "mesa/train/safetensors.h"

namespace mesa {

/// Where training stands. Everything else (data order, random numbers, learning rate) is a function of these.
struct TrainingState {
  int64_t epoch = 0;       ///< epochs finished
  int64_t batch = 0;       ///< batches of the current epoch already used
  int64_t step = 0;        ///< updates tried so far: selects the learning rate
  int64_t micro_step = 0;  ///< forward passes so far: selects the random numbers
  int64_t bad_steps = 0, bad_in_a_row = 0;
  int64_t bad_samples = 0;  ///< pictures that were replaced
  double epoch_loss = 0;    ///< sum over the images of the current epoch
  int64_t epoch_images = 0;
  double epoch_seconds = 0, train_seconds = 0;
  int64_t train_images = 0;
  double interval_loss = 0;  ///< sum over the images since the last line of metrics.jsonl
  int64_t interval_images = 0;
  double interval_seconds = 0, interval_wait = 0;
  double best_top1 = -1;        ///< of the average of the weights where there is one
  int64_t evaluated_step = -1;  ///< `step` at the last evaluation, whose results follow; -1: none yet
  double eval_top1 = 0, eval_top5 = 0, eval_loss = 0, train_loss = 0;
  double eval_top1_ema = kNoResult, eval_top5_ema = kNoResult, eval_loss_ema = kNoResult;  ///< of the average of the weights
  int64_t peak_bytes = 0;
  int64_t ranks = 1;   ///< `batch` counts batches of all of them
  int64_t branch = 0;  ///< how often the run was taken up from an earlier checkpoint than its newest

  static constexpr double kNoResult = std::numeric_limits<double>::quiet_NaN();
};

/// What a checkpoint is made of.
struct CheckpointParts {
  const RunConfig& config;
  const std::vector<std::string>& class_names;
  const ParamStore& params;
  const Optimizer& optimizer;
  const std::map<std::string, Tensor>& moments;  ///< the optimizer's state(), for which ranks that share it must come together
  const StoragePolicy& policy;
  const Ema* ema = nullptr;  ///< or none
};

/// A copy of all that a checkpoint holds, in host memory: training may go on while it is written.
struct CheckpointData {
  TrainingState state;
  std::map<std::string, std::string> metadata;  ///< of the weights' files: the resolved config and the class names
  std::vector<NamedTensor> weights, buffers, averages;
  bool averaged = false;             ///< there are averages
  std::vector<NamedTensor> tensors;  ///< moments and running ranges
  std::string state_file;            ///< the text of state.json
  int64_t bytes() const;             ///< of the tensors
};
/// Copies; `reuse` gives up its memory to it. Of meta tensors it is a plan of the copy.
CheckpointData snapshot_checkpoint(const CheckpointParts& parts, const TrainingState& state, CheckpointData reuse = {});

/// Files: model.safetensors (weights; metadata: the resolved config and the class names), ema.safetensors (their moving average, in the
/// same form, if there is one), state.safetensors (moments, running ranges), state.json, manifest.json. Replaces `folder` in one step;
/// throws Error and leaves the old one when that fails. `former`: as in write_folder_atomically. Computes on one thread and touches
/// nothing but `data` and files.
void write_checkpoint(const std::string& folder, const CheckpointData& data, const std::string& former = "");
/// Both at once.
void save_checkpoint(const std::string& folder, const RunConfig& config, const std::vector<std::string>& class_names,
                     const ParamStore& params, const Optimizer& optimizer, const StoragePolicy& policy, const TrainingState& state,
                     const Ema* ema = nullptr);

/// Which weights of a checkpoint; `automatic`: the moving average if it is there.
enum class WeightsKind { automatic, raw, ema };

/// The weights' file of a checkpoint with the config they were trained by.
struct LoadedModel {
  RunConfig config;
  std::vector<std::string> class_names;
  std::map<std::string, Tensor> weights;
  bool averaged = false;  ///< they are a moving average of the trained weights
};
/// `path`: a checkpoint's folder, a run's folder (its best, else its last checkpoint), or a file of it, which says itself what it is.
/// Verifies checksums. Throws Error where the wanted weights are not there.
/// `config` (or null) describes the model and the preprocessing of a safetensors file that does not say them itself, such as timm's.
LoadedModel load_model(const std::string& path, WeightsKind kind = WeightsKind::automatic, const RunConfig* config = nullptr);
/// The checkpoint folder that `path` stands for; `prefer` is "best" or "last" when it is a run's folder. Throws Error if there is none.
/// Only reads: the run that owns the folder may be writing beside it.
std::string resolve_checkpoint(const std::string& path, const std::string& prefer);

/// The safetensors file that `path` (as for load_model) stands for. `verify`: check the sums of the checkpoint that it belongs to.
std::string weights_file(const std::string& path, WeightsKind kind = WeightsKind::automatic, bool verify = true);

/// Copies weights into the parameters. Throws Error listing all that is missing, unexpected or of another shape.
void load_weights(ParamStore& params, const std::map<std::string, Tensor>& weights, const std::string& source);

/// Weights to begin with, from a checkpoint (its moving average if it has one) or any safetensors file with the model's names. Position
/// embeddings and tables of biases of another grid are resized (resize_bicubic); heads of another number of classes keep their first
/// values; factors of LoRA in the file are merged (merge_lora), those of the model begin anew. Throws Error listing all parameters that are
/// missing or of another shape: the file belongs to another model. Returns what was done, for the log: all that was resized, begins anew or
/// is unused.
std::string start_from_weights(ParamStore& params, const std::string& path);

/// The checkpoint that --resume means, or "" for a fresh start. "auto": the newest of the run's folder `output` that verifies: `last`, else
/// of `best` and the older ones that train.keep left (step-N) that of the latest step; one that does not verify is passed over, and `warn`
/// is told why. Throws Error if checkpoints are there but none is whole, or if the path is missing.
std::string find_checkpoint(const std::string& wish, const std::string& output, const std::function<void(const std::string&)>& warn);

/// Restores everything from a verified checkpoint folder. Running ranges are taken up only where the storage rules are still the same; an
/// average that the checkpoint lacks begins with its weights. Throws UsageError for the state of another optimizer.
struct LoadedRun {
  TrainingState state;
  RunConfig config;             ///< by which the checkpoint was trained
  bool average_begins = false;  ///< it was not in the checkpoint
  uint64_t optimizer_hash = 0;  ///< of its whole state
};
LoadedRun load_checkpoint(const std::string& folder, const RunConfig& config, ParamStore& params, Optimizer& optimizer,
                          StoragePolicy& policy, Ema* ema = nullptr);

/// True if `path` is in `folder` or below it.
bool lies_in(const std::string& path, const std::string& folder);

/// What differs from the run that wrote the checkpoint, as text for the user. Throws UsageError for a key that decides the order of the
/// data while the checkpoint stands within an epoch.
std::string describe_changes(const LoadedRun& loaded, const RunConfig& config);
/// The keys that have another value now and change what is computed, each with its value then: {"train.epochs", "3"}.
std::vector<std::pair<std::string, std::string>> changed_keys(const RunConfig& then, const RunConfig& now);

}  // namespace mesa
