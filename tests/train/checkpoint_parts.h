// A small model with all that its checkpoints hold.
#pragma once
#include <string>
#include <vector>

#include "mesa/optim/adamw.h"
#include "mesa/train/checkpoint.h"
#include "mesa/train/setup.h"

namespace mesa::testing {

inline RunConfig config_of(const std::vector<std::string>& sets = {}) {
  const char* const text = "model: {name: vit, image_size: 16, patch_size: 8, width: 24, depth: 1, heads: 3, classes: 4}\nseed: 5\n";
  return parse_config(text, "c.yaml", sets);
}

struct Parts {
  RunConfig config;
  BuiltModel model;
  StoragePolicy policy;
  AdamW optimizer;
  explicit Parts(const RunConfig& c)
      : config(c),
        model(c, model_config(c, 4)),
        policy(make_policy(c.storage)),
        optimizer((model.params.allocate_gradients(), model.params.params()), {}) {}
  void save(const std::string& folder, const TrainingState& state) {
    save_checkpoint(folder, config, {"a", "b", "c", "d"}, model.params, optimizer, policy, state);
  }
  TrainingState load(const std::string& folder) { return load_checkpoint(folder, config, model.params, optimizer, policy).state; }
};

}  // namespace mesa::testing
