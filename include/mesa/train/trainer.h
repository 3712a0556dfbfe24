// The training run: epochs of updates, evaluation, logs and checkpoints, from a config to an exit code.
#pragma once
#include <string>

#include "mesa/train/config.h"

namespace mesa {

struct TrainOptions {
  /// Empty: a fresh run. "auto": the newest checkpoint of the output folder that verifies, or a fresh run if it has none. Else a path.
  std::string resume;
  bool quiet = false;  ///< no live line, only warnings and the summary
};

/// Runs to the end. Returns 0 when done; 1 when too many steps in a row were not finite (its state is then in checkpoints/failed, or `last`
/// if there was none) or when a file of the result could not be written; 75 when a signal stopped it (after saving). Throws UsageError for
/// what the config got wrong and Error for what failed.
int train(RunConfig config, const TrainOptions& options);

/// What --dry-run prints: the resolved config, the parameter count, the plan of activations and the predicted peak. Trains nothing.
/// With `fit_bytes` > 0 also the largest train.batch_size whose predicted peak fits.
std::string dry_run(const RunConfig& config, int64_t fit_bytes = 0);

}  // namespace mesa
