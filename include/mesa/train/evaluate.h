// How well a model does on a data set.
#pragma once
#include <functional>

#include "mesa/train/setup.h"

namespace mesa {

struct EvalResult {
  double loss = 0;             ///< mean cross-entropy without smoothing
  double top1 = 0, top5 = 0;   ///< percent; top5 counts the best min(5, classes)
  int64_t images = 0;
  int64_t left_out = 0;        ///< damaged pictures that data.on_bad_sample: skip leaves out of all of these
  double seconds = 0;
  bool complete = true;        ///< false if it was interrupted
  double images_per_second() const { return seconds > 0 ? static_cast<double>(images) / seconds : 0; }
};

/// Runs every batch of the loader's epoch 0 without a tape. `stop` is asked before each batch; `progress` is told images done; `look` is shown
/// each batch with its logits, f32 [B, K] on the CPU.
EvalResult evaluate(const BuiltModel& model, Loader& loader, const TransformOptions& transform, const std::function<bool()>& stop = {},
                    const std::function<void(int64_t done)>& progress = {},
                    const std::function<void(const Batch& batch, const Tensor& logits)>& look = {});

/// How many of the batch's labels are among the `k` highest logits (ties resolved for the lower class, NaN counts as wrong).
int64_t count_top(const Tensor& logits, const Tensor& labels, int64_t k);

}  // namespace mesa
