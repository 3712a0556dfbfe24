// From a run's config to the objects that it names: model, data, transforms, storage policy, optimizer schedule.
#pragma once
#include <string>

#include "mesa/base/cuda.h"
#include "mesa/data/loader.h"
#include "mesa/models/model.h"
#include "mesa/optim/optimizer.h"
#include "mesa/train/config.h"

namespace mesa {

/// The model's configuration: the table entry that model.name selects, changed by the fields that are set. `classes` (of the data) fills in
/// where the config is silent; 0 if unknown. Throws UsageError naming the key's place.
NetConfig model_config(const RunConfig& config, int64_t classes);
/// bf16 or f32 for matrix products. Throws UsageError with the reason where `device` has no bf16 products (unless train.force_precision).
DType compute_dtype(const RunConfig& config, Device device);
/// What pictures are given as: on a GPU the type of products, which round them in any case, else f32.
DType picture_dtype(const RunConfig& config, Device device);
/// The device; `auto` takes a GPU where one can be used. Throws Error with the reason if `cuda` is asked for and not to be had.
Device choose_device(const std::string& name);
/// What a reader of the log should know of that choice: "cpu (no NVIDIA GPU was found)", "cuda: NVIDIA H200, ...".
std::string describe_device(const std::string& wish, Device device);
/// Compute threads: train.threads, or where it is 0 what OMP_NUM_THREADS says, or all cores.
void use_threads(const RunConfig& config);
/// Both halves of the data; kind `random` is noise with random labels, for benchmarks.
/// `train` false: only the test half is opened, and `train` of the pair is empty.
DatasetPair make_datasets(const RunConfig& config, const ImageConfig& model, bool train = true);
/// The same for training: refuses, with the key's place, a batch or a number of classes that does not fit the data.
DatasetPair make_training_data(const RunConfig& config, const ImageConfig& model);
/// How many classes the data has without opening it, 0 if only opening tells.
int64_t known_classes(const RunConfig& config);
TransformOptions make_transform(const RunConfig& config, const ImageConfig& model);
LoaderOptions make_loader_options(const RunConfig& config, bool train, Device device);
StoragePolicy make_policy(const StorageConfig& storage);
/// The rules of configs/storage/exact.yaml, built in: what plans and benchmarks compare with, whatever files lie around.
StorageConfig reference_storage();
/// A batch as the model takes it, on its device: images [B, C, H, W], normalized and mixed; labels i64 [B]; what the mixing was.
struct Prepared {
  Tensor images, labels, mixing;
};
/// A batch of the loader on its way to the device: on a GPU copied beside whatever it is working on.
struct SentBatch {
  Batch host;                               ///< u8 [B, H, W, C] and i64 [B]; on a GPU it must live until the copy has arrived
  Tensor pixels, labels, mirrored, mixing;  ///< the same on the device
  cuda::Mark arrival;                       ///< null on the CPU
  std::shared_ptr<void> guard;              ///< whoever drops a batch waits until nothing copies from or to its memory
};
/// Checks the labels against `classes` and starts the copy, which waits for `after` where that is given.
SentBatch send(Batch batch, int64_t classes, Device device, const cuda::Mark& after = {});
/// Normalizes, mirrors and mixes on the device, once the copy has arrived; images in f32 or bf16.
Prepared prepare(const SentBatch& batch, const TransformOptions& transform, DType images = DType::f32);

/// A model with its parameters: what training, evaluation and benchmarks share.
struct BuiltModel {
  BuiltModel(const RunConfig& config, const NetConfig& model, Device device = kCpu);
  Device device;
  DType images;  ///< picture_dtype
  ParamStore params;
  Net net;
};

/// "blocks.0.norm1.weight (element 7)": the first parameter that holds a NaN or infinity, or "".
std::string first_bad_parameter(const ParamStore& params);

}  // namespace mesa
