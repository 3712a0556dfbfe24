// Layer-wise decay of the learning rate.
#pragma once
#include <deque>
#include <string>
#include <vector>

#include "mesa/autograd/var.h"

namespace mesa {

/// The layer of each parameter by its name, as timm's group_parameters counts them: 0 for the embeddings, then the blocks in order (through
/// all stages), the last one with the final norm, and behind it the head with all names that are of no known kind. What a stage of a
/// pyramid has in front of its blocks (merging, embedding, positions) goes with its first block.
std::vector<int64_t> layer_ids(const std::vector<std::string>& names);

/// Sets Param::lr_scale to decay^(last layer - layer) (Clark et al., ICLR 2020; timm's param_groups_layer_decay); 1 leaves all alike.
void set_layer_decay(std::deque<Param>& params, double decay);

}  // namespace mesa
