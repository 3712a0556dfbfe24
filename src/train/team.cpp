#include "team.h"

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <sstream>

#include "mesa/base/random.h"
#include "mesa/kernels/elementwise.h"
#include "mesa/train/signals.h"
#include "mesa/train/version.h"

namespace mesa {

void Team::add_up(std::vector<double>& values) {
  if (alone()) return;
  const Tensor sums = to(Tensor::from<double>({static_cast<int64_t>(values.size())}, values), device_);
  communicator_.all_reduce(sums);
  communicator_.finish();
  values = to(sums, kCpu).to_vector<double>();
}

void Team::average(const Tensor& x) {
  if (alone() || !x.defined()) return;
  communicator_.all_reduce(x);
  communicator_.finish();
  kernels::scale(x, 1.0 / static_cast<double>(size()), x);
}

std::vector<double> Team::gather(double value) {
  std::vector<double> all(static_cast<size_t>(size()));
  all[static_cast<size_t>(rank())] = value;
  add_up(all);
  return all;
}

int64_t Team::largest(int64_t value) {
  const std::vector<double> all = gather(static_cast<double>(value));
  return std::llround(*std::max_element(all.begin(), all.end()));
}

int64_t Team::heard_signal() {
  const int64_t own = received_signal();
  return own != 0 || alone() ? own : world_.control()->signal();
}

std::string Team::shared(const std::string& what, const std::string& text) {
  return alone() ? text : world_.control()->exchange(what, text).front();
}

std::string Team::first_of(const std::string& what, const std::string& text) {
  if (alone()) return text;
  const std::vector<std::string> all = world_.control()->exchange(what, text);
  for (size_t r = 0; r < all.size(); ++r)
    if (!all[r].empty()) return concat("rank ", r, ": ", all[r]);
  return "";
}

namespace {

/// The lines in which two texts differ, one from each.
std::string difference(const std::string& a, const std::string& b) {
  std::istringstream first(a), second(b);
  std::string x, y;
  while (true) {
    const bool more_x = static_cast<bool>(std::getline(first, x)), more_y = static_cast<bool>(std::getline(second, y));
    if (!more_x && !more_y) return "";
    if (x != y || more_x != more_y) return concat("'", more_x ? x : "", "' and '", more_y ? y : "", "'");
  }
}

}  // namespace

void check_same(World& world, const std::string& what, const std::string& text) {
  if (world.alone()) return;
  // Hashes first: long texts of many ranks would be a long message.
  const std::vector<std::string> hashes = world.control()->exchange("hashes of " + what, std::to_string(hash_name(text)));
  const auto odd = std::find_if(hashes.begin(), hashes.end(), [&](const std::string& hash) { return hash != hashes[0]; });
  if (odd == hashes.end()) return;
  const int64_t other = odd - hashes.begin();
  const bool concerned = world.leads() || world.me().rank == other;
  const std::vector<std::string> texts = world.control()->exchange(what, concerned ? text : "");
  const std::string reason =
      concat("ranks 0 and ", other, " differ in ", what, ": ", difference(texts.front(), texts[static_cast<size_t>(other)]));
  throw RankFailure(reason, false);
}

Device check_same_run(World& world, const RunConfig& config) {
  check_same(world, "version", version_text(false));
  check_same(world, "config", to_yaml(config));
  const Device device = choose_device(config.device);
  check_same(world, "device", is_gpu(device) ? describe_device(config.device, device) : "cpu");  // not why: a host may lack GPUs for some
  return device;
}

int together(World& world, const std::function<int()>& work, const std::function<void(const std::string& why)>& tell) {
  try {
    return work();
  } catch (const RankFailure& e) {
    tell(e.what());
    return e.exit_code();
  } catch (const std::exception& e) {
    if (world.alone()) throw;
    const RankFailure end = world.control()->report(e.what());
    tell(end.what());
    return dynamic_cast<const UsageError*>(&e) != nullptr ? 2 : end.exit_code();
  }
}

int together(World& world, const std::function<int()>& work) {
  return together(world, work, [&](const std::string& why) {
    if (world.control()->speaks()) std::fprintf(stderr, "error: %s\n", why.c_str());
  });
}

int64_t share_threads(const RunConfig& config, World& world) {
  if (world.alone()) return 1;
  cpu_set_t set;
  CPU_ZERO(&set);
  sched_getaffinity(0, sizeof set, &set);
  std::string processors = world.me().host + " ";
  for (int i = 0; i < CPU_SETSIZE; ++i) processors += CPU_ISSET(i, &set) ? '1' : '0';
  const std::vector<std::string> all = world.control()->exchange("processors", std::to_string(hash_name(processors)));
  const int64_t sharing = std::count(all.begin(), all.end(), std::to_string(hash_name(processors)));
  if (config.train.threads == 0 && std::getenv("OMP_NUM_THREADS") == nullptr)
    omp_set_num_threads(std::max<int>(1, omp_get_num_procs() / static_cast<int>(sharing)));
  return sharing;
}

}  // namespace mesa
