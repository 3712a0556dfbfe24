// Names of weights in files from elsewhere: prefixes of wrappers, tensors that say nothing, and lists of names for people.
#pragma once
#include <string>
#include <vector>

#include "mesa/train/safetensors.h"

namespace mesa {

/// Gives weights from elsewhere the names that the models here have, which are timm's. Prefixes that wrappers put in front of every name go
/// ("module." of DistributedDataParallel, "_orig_mod." of torch.compile, "model." of trainers). The original Swin (and timm before 0.9) has
/// its downsampling at the end of the stage before, "layers.0.downsample", and "head" for "head.fc"; the original DeiT III "gamma_1" for
/// "ls1.gamma". What has none of these names stays as it is.
void rename_as_here(SafetensorsFile& file);

/// A tensor that follows from the model's sizes or has no use here: "...num_batches_tracked", which matters only to batch norms without a
/// momentum, and a Swin's "...relative_position_index" and "...attn_mask".
bool is_derived(const std::string& name);

/// All items, in order, those that differ only in the last number between two dots of their name as one: "missing
/// blocks.[0-11].norm1.weight [192]". A few stand in one line, more have a line each.
std::string list_all(const std::vector<std::string>& items);

}  // namespace mesa
