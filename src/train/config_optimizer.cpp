// Which keys an optimizer and a schedule have, and their values where they are not given.
#include <algorithm>
#include <vector>

#include "config_keys.h"

namespace mesa {

namespace {

template <class T>
void fill(std::optional<T>& field, T value) {
  if (!field) field = value;
}

struct Owned {
  const char* key;
  bool set;
  std::vector<std::string> owners;
};

void check_owner(const RunConfig& config, const Owned& owned, const std::string& section, const std::string& chosen) {
  if (!owned.set || std::find(owned.owners.begin(), owned.owners.end(), chosen) != owned.owners.end()) return;
  std::string owners;
  for (const std::string& owner : owned.owners) owners += (owners.empty() ? "" : " or ") + owner;
  config.refuse(owned.key, "is nothing that ", chosen, " has; leave it out (or set it to null), or set ", section, ".name to ", owners);
}

}  // namespace

OptimizerConfig with_defaults(OptimizerConfig config) {
  if (config.name == "sgd") {
    fill(config.momentum, 0.9), fill(config.nesterov, false);
    return config;
  }
  const bool lamb = config.name == "lamb";
  fill(config.beta1, 0.9), fill(config.beta2, 0.999), fill(config.eps, lamb ? 1e-6 : 1e-8);
  if (lamb) fill(config.trust_clip, false);
  return config;
}

void config::check_optimizer(const RunConfig& c) {
  const OptimizerConfig& o = c.optimizer;
  const std::vector<std::string> adam{"adamw", "lamb"}, sgd{"sgd"}, lamb{"lamb"}, step{"step"};
  for (const Owned& owned :
       {Owned{"optimizer.beta1", o.beta1.has_value(), adam}, Owned{"optimizer.beta2", o.beta2.has_value(), adam},
        Owned{"optimizer.eps", o.eps.has_value(), adam}, Owned{"optimizer.momentum", o.momentum.has_value(), sgd},
        Owned{"optimizer.nesterov", o.nesterov.has_value(), sgd}, Owned{"optimizer.trust_clip", o.trust_clip.has_value(), lamb}})
    check_owner(c, owned, "optimizer", o.name);
  for (const Owned& owned : {Owned{"schedule.decay_rate", c.schedule.decay_rate.has_value(), step},
                             Owned{"schedule.decay_epochs", c.schedule.decay_epochs.has_value(), step}})
    check_owner(c, owned, "schedule", c.schedule.name);
  if (o.nesterov.value_or(false) && o.momentum == 0.0) c.refuse("optimizer.nesterov", "needs a momentum, and optimizer.momentum is 0");
  if (c.train.ema_warmup && c.train.ema_decay == 0) c.refuse("train.ema_warmup", "needs an average: set train.ema_decay, such as 0.9999");
}

}  // namespace mesa
