// Names of weights in files from elsewhere: prefixes of wrappers, tensors that say nothing, and lists of names for people.
#pragma once
#include <string>
#include <vector>

#include "mesa/train/safetensors.h"

namespace mesa {

/// Takes away the prefixes that wrappers put in front of every name ("module." of DistributedDataParallel, "_orig_mod." of torch.compile,
/// "model." of trainers), as long as all names begin with the same one.
void strip_wrappers(SafetensorsFile& file);

/// A tensor that follows from the model's sizes or has no use here: "...num_batches_tracked", which matters only to batch norms without a
/// momentum, and a Swin's "...relative_position_index" and "...attn_mask".
bool is_derived(const std::string& name);

/// All items, in order, those that differ only in the last number between two dots of their name as one: "missing
/// blocks.[0-11].norm1.weight [192]". A few stand in one line, more have a line each.
std::string list_all(const std::vector<std::string>& items);

}  // namespace mesa
