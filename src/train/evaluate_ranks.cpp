// An evaluation by one rank, or in parts by several.
#include "mesa/train/evaluate.h"
#include "mesa/train/signals.h"
#include "mesa/train/version.h"
#include "team.h"

namespace mesa {

int evaluate_on_ranks(RunConfig& config, const std::function<int(bool leads, const AddUp& add_up)>& body) {
  World world(config.train.rank_timeout);
  config.rank = world.me().rank, config.ranks = world.me().world;
  return together(world, [&] {
    check_same(world, "version", version_text());
    check_same(world, "config", to_yaml(config));
    use_threads(config);
    share_threads(config, world);
    Team team(world, choose_device(config.device));
    return body(world.leads(), [&](std::vector<double>& values) { team.add_up(values); });
  });
}

}  // namespace mesa
