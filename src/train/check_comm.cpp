#include "mesa/train/check_comm.h"

#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "mesa/kernels/elementwise.h"
#include "mesa/train/version.h"
#include "team.h"

namespace mesa {
namespace {

/// Seconds of the fastest of a few sums over all ranks.
double time_of_sum(Team& team, const Tensor& x) {
  double best = 1e30;
  for (int i = 0; i < 5; ++i) {
    team.communicator().barrier();
    const auto start = std::chrono::steady_clock::now();
    team.communicator().all_reduce(x);
    team.communicator().finish();
    if (is_gpu(x.device())) cuda::synchronize();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

/// Everybody's line, on rank 0.
void print_ranks(World& world, const std::string& mine) {
  const std::vector<std::string> all = world.alone() ? std::vector<std::string>{mine} : world.control()->exchange("who is there", mine);
  if (!world.leads()) return;
  for (size_t r = 0; r < all.size(); ++r) std::printf("rank %zu: %s\n", r, all[r].c_str());
}

}  // namespace

int check_comm(RunConfig config) {
  World world(config.train.rank_timeout);
  return together(world, [&] {
    use_threads(config);
    share_threads(config, world);
    const std::string version = version_text(false);
    char hash[32];
    std::snprintf(hash, sizeof hash, "%016llx", static_cast<unsigned long long>(hash_name(to_yaml(config))));
    print_ranks(world, concat("host ", world.me().host, ", local rank ", world.me().local_rank, ", pid ", getpid(), ", ",
                              describe_device(config.device, choose_device(config.device)), ", ", omp_get_max_threads(), " threads, ",
                              version.substr(0, version.find('\n')), ", config ", hash));
    const Device device = check_same_run(world, config);  // before any collective: where ranks differ, it might not come about
    Team team(world, device);
    if (team.alone()) {
      std::printf("this rank is alone: there is nobody to add up with (mpirun -n 2 mesa-train ... --check-comm)\n");
      return 0;
    }
    for (const int64_t megabytes : {1, 8, 64}) {
      const Tensor x = Tensor::zeros({megabytes * 1'000'000 / 4}, DType::f32, device);
      const double seconds = time_of_sum(team, x);
      if (team.leads())
        std::printf("sum of %lld MB over %lld ranks: %.2f ms, %.2f GB/s\n", static_cast<long long>(megabytes),
                    static_cast<long long>(team.size()), 1e3 * seconds, static_cast<double>(megabytes) / 1e3 / seconds);
    }
    if (team.leads()) std::printf("all %lld ranks are there and agree\n", static_cast<long long>(team.size()));
    return 0;
  });
}

}  // namespace mesa
