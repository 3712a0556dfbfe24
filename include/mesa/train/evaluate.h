// How well a model does on a data set.
#pragma once
#include <functional>
#include <optional>

#include "mesa/optim/ema.h"
#include "mesa/train/setup.h"

namespace mesa {

struct EvalResult {
  double loss = 0;            ///< mean cross-entropy without smoothing
  double top1 = 0, top5 = 0;  ///< percent; top5 counts the best min(5, classes)
  int64_t images = 0;
  int64_t left_out = 0;  ///< damaged pictures that data.on_bad_sample: skip leaves out of all of these
  double seconds = 0;
  bool complete = true;  ///< false if it was interrupted
  double images_per_second() const { return seconds > 0 ? static_cast<double>(images) / seconds : 0; }
};

/// Makes each value its sum over the ranks that share an evaluation.
using AddUp = std::function<void(std::vector<double>&)>;

using Look = std::function<void(const Batch& batch, const Tensor& logits)>;

/// Runs every batch of the loader's epoch 0 without a tape; with transform.eval_flip logits are the mean over a picture and its mirror
/// image. `stop` is asked before each batch; `progress` is told images done; `look` is shown each batch with its logits, f32 [B, K] on the
/// CPU. With `add_up` the loader's batches are one rank's, and the result is that of all.
EvalResult evaluate(const BuiltModel& model, Loader& loader, const TransformOptions& transform, const std::function<bool()>& stop = {},
                    const std::function<void(int64_t done)>& progress = {}, const Look& look = {}, const AddUp& add_up = {});

/// Runs `body` in each of the processes that were started together (see World), after setting the config's rank and ranks; they must have
/// the same config. The first leads: it alone prints and writes. `add_up` adds over all of them. Returns what `body` returns, or the exit
/// code of a rank that fails or loses another, after the leader has told why; one rank alone passes exceptions on.
int evaluate_on_ranks(RunConfig& config, const std::function<int(bool leads, const AddUp& add_up)>& body);

/// What an evaluation of the weights found, and of their moving average where there is one.
struct Evaluations {
  EvalResult raw;
  std::optional<EvalResult> ema;
  bool complete() const { return raw.complete && (!ema || ema->complete); }
  /// By which checkpoints are compared.
  const EvalResult& judged() const { return ema ? *ema : raw; }
};
/// Both, one after the other; `ema` may be null. `look` sees the batches of the one that is judged.
Evaluations evaluate_all(const BuiltModel& model, Ema* ema, Loader& loader, const TransformOptions& transform,
                         const std::function<bool()>& stop, const std::function<void(int64_t done)>& progress = {}, const Look& look = {},
                         const AddUp& add_up = {});

/// Whether fewer than `k` of the K logits are better than the label's: higher, or as high and of a lower class. NaN is never among the
/// best. Throws Error for a label that is no class.
bool is_among_best(const float* logits, int64_t classes, int64_t label, int64_t k);
/// How many of the batch's labels are among the `k` highest logits (ties resolved for the lower class, NaN counts as wrong).
int64_t count_top(const Tensor& logits, const Tensor& labels, int64_t k);

}  // namespace mesa
