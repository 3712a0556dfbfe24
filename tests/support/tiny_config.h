// The smallest run that has all parts of one, in a few milliseconds; what stores activations is left to who uses it.
#pragma once
#include <string>

namespace mesa::testing {

inline const std::string kTinyTraining =
    "model: {name: vit, image_size: 16, patch_size: 8, width: 24, depth: 1, heads: 3, pool: mean}\n"
    "data: {kind: shapes, train_size: 96, test_size: 32, workers: 1}\n"
    "train: {epochs: 2, batch_size: 16, log_interval: 1, threads: 1}\n"
    "optimizer: {lr: 1e-3}\n";

}  // namespace mesa::testing
