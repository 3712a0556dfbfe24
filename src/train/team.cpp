#include "team.h"

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <cstdlib>

#include "mesa/base/random.h"

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
  // All texts go to all ranks: short ones first, so that thousands fit into a message, and the whole ones of two where they differ.
  const std::vector<std::string> hashes = world_.control()->exchange(std::to_string(hash_name(text)));
  const auto other = std::find_if(hashes.begin(), hashes.end(), [&](const std::string& hash) { return hash != hashes[0]; });
  if (other == hashes.end()) return;
  const auto r = static_cast<size_t>(other - hashes.begin());
  const bool shown = rank() == 0 || rank() == static_cast<int64_t>(r);
  const std::vector<std::string> all = world_.control()->exchange(shown ? text : "");
  fail("ranks 0 and ", r, " differ in ", what, ":\n  rank 0: ", all[0], "\n  rank ", r, ": ", all[r]);
}

void share_threads(const RunConfig& config, World& world) {
  if (world.alone() || config.train.threads > 0 || std::getenv("OMP_NUM_THREADS") != nullptr) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  sched_getaffinity(0, sizeof set, &set);
  std::string processors = world.me().host + " ";
  for (int i = 0; i < CPU_SETSIZE; ++i) processors += CPU_ISSET(i, &set) ? '1' : '0';
  const std::string mine = std::to_string(hash_name(processors));  // short, since everybody's goes to everybody
  const std::vector<std::string> all = world.control()->exchange(mine);
  const auto sharing = std::count(all.begin(), all.end(), mine);
  omp_set_num_threads(std::max<int>(1, omp_get_num_procs() / static_cast<int>(sharing)));
}

}  // namespace mesa
