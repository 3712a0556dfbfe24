// Low-rank adaptation of a run: which linears, what learns, and factors merged back into the weights that they adapt.
#pragma once
#include "mesa/nn/lora.h"
#include "mesa/train/checkpoint.h"
#include "mesa/train/safetensors.h"

namespace mesa {

LoraOptions lora_options(const RunConfig& config);

/// Throws UsageError where the factors of weights that `then` trained would be multiplied by another number: it is part of what they mean.
void check_same_factor(const RunConfig& then, const RunConfig& now);

/// Freezes what the config does not train. With lora.rank the factors learn, the head unless it has factors itself, and what lora.train
/// names; train.frozen comes last. Throws UsageError for a glob that no linear or parameter matches, naming near ones.
void choose_trained(const RunConfig& config, ParamStore& params);

/// "rank 8, alpha 16 on 12 linears; 185956 of 21851620 parameters are trained": for the log and the dry run.
std::string describe_lora(const RunConfig& config, const ParamStore& params);

/// Adds factor B A to each weight that has such factors and drops these: the plain model of the same function, in f32. `source` names the
/// file in errors. Returns how many linears it was. Throws Error where the file's config does not tell alpha, or factors do not fit.
int64_t merge_lora(SafetensorsFile& weights, const std::string& source);

/// Writes the weights of a checkpoint (as for load_model), merged, to `file`, with the config of the plain model. Returns what was done.
/// Throws Error if there is nothing to merge or `file` lies in a checkpoint; `file` is replaced in one step.
std::string write_merged(const std::string& checkpoint, WeightsKind kind, const std::string& file);

}  // namespace mesa
