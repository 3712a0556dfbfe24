// From a run's config to its optimizer, learning rates and moving average.
#pragma once
#include <memory>
#include <string>

#include "mesa/dist/gradient_sync.h"
#include "mesa/nn/builder.h"
#include "mesa/optim/ema.h"
#include "mesa/optim/optimizer.h"
#include "mesa/optim/schedule.h"
#include "mesa/train/config.h"

namespace mesa {

/// Allocates gradients in the order in which they leave for other ranks, and where the optimizer is shared puts the values likewise. Null
/// for one rank. Of a run's first things: what it moves must not have been given away.
std::unique_ptr<GradientSync> share_gradients(const RunConfig& config, ParamStore& params, Communicator& communicator);
/// Runs once the collectives that gradients will go through, all ranks at the same time: NCCL connects the GPUs in another way for each
/// kind and size, and takes memory for it as the first of them runs. Of a rank that is alone,
/// or on the CPU, nothing.
void rehearse_collectives(const RunConfig& config, Communicator& communicator);
/// What this rank's optimizer has where train.shard is `optimizer`, else all; its state is put together on rank 0. `sync` and
/// `communicator` outlive it.
OptimizerShard shard_of(GradientSync* sync, Communicator& communicator);

/// Writes optimizer.no_decay and optimizer.layer_decay into the parameters and makes the optimizer. Throws UsageError for a glob that no
/// parameter matches.
std::unique_ptr<Optimizer> make_optimizer(const RunConfig& config, ParamStore& params, OptimizerShard shard = {});
/// The average of the weights, null where train.ema_decay is 0.
std::unique_ptr<Ema> make_ema(const RunConfig& config, ParamStore& params);
/// Images of one update.
int64_t images_per_update(const RunConfig& config);
/// The schedule in updates, with all its learning rates multiplied as optimizer.lr_base_batch asks (Goyal et al., 2017).
Schedule make_schedule(const RunConfig& config, int64_t updates_per_epoch);

/// "adamw, learning rate 0.001 (0.0005 * 1024 images an update / 512), cosine; weight decay 0.05 on 50 of 152 tensors; ...": for the log
/// and the dry run, of parameters that have been through make_optimizer.
std::string describe_optimizer(const RunConfig& config, const ParamStore& params);

}  // namespace mesa
