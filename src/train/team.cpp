#include "team.h"

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <cstdlib>

namespace mesa {

void Team::add_up(std::vector<double>& values) {
  if (alone()) return;
  const Tensor sums = to(Tensor::from<double>({static_cast<int64_t>(values.size())}, values), device_);
  communicator_.all_reduce(sums);
  communicator_.finish();
  values = to(sums, kCpu).to_vector<double>();
}

std::vector<double> Team::gather(double value) {
  std::vector<double> all(static_cast<size_t>(size()));
  all[static_cast<size_t>(rank())] = value;
  add_up(all);
  return all;
}

std::string Team::shared(const std::string& text) { return alone() ? text : world_.control()->exchange(text).front(); }

std::string Team::first_of(const std::string& text) {
  if (alone()) return text;
  const std::vector<std::string> all = world_.control()->exchange(text);
  for (size_t r = 0; r < all.size(); ++r)
    if (!all[r].empty()) return concat("rank ", r, ": ", all[r]);
  return "";
}

void Team::check_same(const std::string& text, const std::string& what) {
  if (alone()) return;
  const std::vector<std::string> all = world_.control()->exchange(text);
  for (size_t r = 1; r < all.size(); ++r)
    check(all[r] == all[0], "ranks 0 and ", r, " differ in ", what, ":\n  rank 0: ", all[0], "\n  rank ", r, ": ", all[r]);
}

void share_threads(const RunConfig& config, World& world) {
  if (world.alone() || config.train.threads > 0 || std::getenv("OMP_NUM_THREADS") != nullptr) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  sched_getaffinity(0, sizeof set, &set);
  std::string processors = world.me().host + " ";
  for (int i = 0; i < CPU_SETSIZE; ++i) processors += CPU_ISSET(i, &set) ? '1' : '0';
  const std::vector<std::string> all = world.control()->exchange(processors);
  const auto sharing = std::count(all.begin(), all.end(), processors);
  omp_set_num_threads(std::max<int>(1, omp_get_num_procs() / static_cast<int>(sharing)));
}

}  // namespace mesa
