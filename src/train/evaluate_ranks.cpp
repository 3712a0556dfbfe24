// An evaluation by one rank, or in parts by several.
#include "mesa/train/evaluate.h"
#include "team.h"

namespace mesa {

int evaluate_on_ranks(RunConfig& config, const std::function<int(bool leads, const AddUp& add_up)>& body) {
  World world(config.train.rank_timeout);
  config.rank = world.me().rank, config.ranks = world.me().world;
  return together(world, [&] {
    const Device device = check_same_run(world, config);
    use_threads(config);
    share_threads(config, world);
    Team team(world, device);
    return body(world.leads(), [&](std::vector<double>& values) { team.add_up(values); });
  });
}

}  // namespace mesa
