// What a run needs to go on, in one verified folder: weights under timm's names, and the training state beside them.
#pragma once
#include "mesa/nn/builder.h"
#include "mesa/optim/adamw.h"
#include "mesa/storage/policy.h"
#include "mesa/train/config.h"

namespace mesa {

/// Where training stands. Everything else (data order, random numbers, learning rate) is a function of these.
struct TrainingState {
  int64_t epoch = 0;        ///< epochs finished
  int64_t batch = 0;        ///< batches of the current epoch already used
  int64_t step = 0;         ///< updates tried so far: selects the learning rate
  int64_t micro_step = 0;   ///< forward passes so far: selects the random numbers
  int64_t bad_steps = 0, bad_in_a_row = 0;
  double epoch_loss = 0;    ///< sum over the images of the current epoch
  int64_t epoch_images = 0;
  double epoch_seconds = 0, train_seconds = 0;
  int64_t train_images = 0;
  double best_top1 = -1;
};

/// Files: model.safetensors (weights; metadata: the resolved config and the class names), state.safetensors (moments, running ranges),
/// state.json, manifest.json. Replaces `folder` in one step; throws Error and leaves the old one when that fails.
void save_checkpoint(const std::string& folder, const RunConfig& config, const std::vector<std::string>& class_names, const ParamStore& params,
                     const AdamW& optimizer, const StoragePolicy& policy, const TrainingState& state);

/// The weights' file of a checkpoint with the config they were trained by.
struct LoadedModel {
  RunConfig config;
  std::vector<std::string> class_names;
  std::map<std::string, Tensor> weights;
};
/// `path`: a checkpoint's folder, a run's folder (its best, else its last checkpoint), or a model.safetensors. Verifies checksums.
LoadedModel load_model(const std::string& path);
/// The checkpoint folder that `path` stands for; `prefer` is "best" or "last" when it is a run's folder. Throws Error if there is none.
std::string resolve_checkpoint(const std::string& path, const std::string& prefer);

/// Copies weights into the parameters. Throws Error listing what is missing, unexpected or of another shape (the first few).
void load_weights(ParamStore& params, const std::map<std::string, Tensor>& weights, const std::string& source);

/// Restores everything from a verified checkpoint folder.
TrainingState load_checkpoint(const std::string& folder, ParamStore& params, AdamW& optimizer, StoragePolicy& policy);

}  // namespace mesa
