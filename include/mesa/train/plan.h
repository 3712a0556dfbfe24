// What a run will take, before it takes it: one training step and one evaluation on tensors without memory.
#pragma once
#include "mesa/train/setup.h"

namespace mesa {

struct Plan {
  int64_t parameters = 0;
  int64_t trained = 0;                 ///< of them
  std::vector<SiteRecord> sites;       ///< of one batch
  int64_t activation_bytes = 0;        ///< kept by one batch
  int64_t exact_activation_bytes = 0;  ///< what the policy `exact` would keep of it
  int64_t checkpoint_bytes = 0;        ///< on the training device: the copy that is written beside training
  /// What the allocator takes from the system, with what is lost between blocks: all of it and, on a GPU, its parts, for what outlives a
  /// pass, for the rest, and for recorded passes (train.cuda_graph).
  int64_t reserved = 0, lasting = 0, passing = 0, recorded = 0;
  BlockEnd cut_from = BlockEnd::high;  ///< on a GPU, the one by which it takes less
  MemoryUse peak;  ///< `peak` and `peak_kind` of a run: steps, evaluation and the loaders' batches; scratch of matrix products not
};

/// Runs forward, backward, update and evaluation on meta tensors: every allocation is metered as in a real step. Also checks that every
/// storage rule matches a site. Throws UsageError.
Plan plan_run(const RunConfig& config, const NetConfig& model);

/// Takes the memory of a plan from a GPU before anything else takes some, or what there is of it; with room for the scratch of kernels, as
/// far as the GPU's libraries need it less. What recorded passes need they take themselves.
void reserve_memory(const Plan& plan, Device gpu);
/// What a cache of recorded passes needs: the plan's part and scratch.
int64_t memory_of_records(const Plan& plan);

/// All models of the table: name, parameters, GFLOPs (multiply-adds, as papers count), input size, and bytes kept for an image by the
/// shipped policies exact, int8 and int4.
std::string list_models();

/// The largest train.batch_size for which the allocator takes no more than `bytes` from the system, with what is lost between blocks and
/// some room for the scratch of kernels; 0 if there is none. Tens of plans: a second or so.
int64_t largest_batch(const RunConfig& config, const NetConfig& model, int64_t bytes);
/// What a reader of an out-of-memory error needs: the plan by kind, the sites that keep most, and the largest batch that would fit the
/// device. Never throws: an explanation must not hide the error.
std::string explain_out_of_memory(const RunConfig& config);
/// Bytes that this process may still have on the device: what is free, and what it has reserved and does not use.
int64_t available_memory(Device device);

/// "blocks.3.attn.qkv:x" -> "blocks.*.attn.qkv:x", so that equal blocks count as one.
std::string fold_site(const std::string& site);

/// The plan as text: totals, and a table of the sites with shape, codec, exact and kept bytes. Blocks that keep the same are shown once
/// unless `all`.
std::string format_plan(const Plan& plan, int64_t batch_size, bool all = false);

}  // namespace mesa
