// What a run will take, before it takes it: one training step and one evaluation on tensors without memory.
#pragma once
#include "mesa/train/setup.h"

namespace mesa {

struct Plan {
  int64_t parameters = 0;
  std::vector<SiteRecord> sites;       ///< of one batch
  int64_t activation_bytes = 0;        ///< kept by one batch
  int64_t exact_activation_bytes = 0;  ///< what the policy `exact` would keep of it
  MemoryUse peak;  ///< `peak` and `peak_kind` of a run: steps, evaluation and the loaders' batches; scratch of matrix products not
};

/// Runs forward, backward, update and evaluation on meta tensors: every allocation is metered as in a real step. Also checks that every
/// storage rule matches a site. Throws UsageError.
Plan plan_run(const RunConfig& config, const VitConfig& model);

/// The plan as text: totals, and a table of the sites with shape, codec, exact and kept bytes. Blocks that keep the same are shown once
/// unless `all`.
std::string format_plan(const Plan& plan, int64_t batch_size, bool all = false);

}  // namespace mesa
