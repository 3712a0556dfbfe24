// What the ranks of a run decide together, so that each takes every step like the others.
#pragma once
#include "mesa/dist/gradient_sync.h"
#include "mesa/dist/world.h"
#include "mesa/train/setup.h"

namespace mesa {

class Team {
 public:
  Team(World& world, Device device) : world_(world), device_(device), communicator_(world.communicator(device)) {
    if (!alone()) communicator_.barrier();  // NCCL takes some of its buffers at its first collective: before a plan takes the rest
  }
  bool alone() const { return world_.alone(); }
  /// The one that writes logs and checkpoints.
  bool leads() const { return world_.leads(); }
  int64_t rank() const { return world_.me().rank; }
  int64_t size() const { return world_.me().world; }
  Communicator& communicator() { return communicator_; }

  /// Each becomes its sum over ranks.
  void add_up(std::vector<double>& values);
  /// Each rank's value, by rank.
  std::vector<double> gather(double value);
  int64_t largest(int64_t value);
  /// x becomes the mean over ranks; an undefined one stays.
  void average(const Tensor& x);
  /// The leader's text. `what` names the exchange in errors, here and below.
  std::string shared(const std::string& what, const std::string& text);
  /// The text of the first rank that has any, with its name.
  std::string first_of(const std::string& what, const std::string& text);
  void at_step(int64_t step) {
    if (!alone()) world_.control()->at_step(step);
  }
  /// The signal that this rank has received, or knows that another has; 0 without one.
  int64_t heard_signal();
  /// While it lives, the others may wait: a checkpoint is being written.
  std::unique_ptr<Control::Busy> busy() { return alone() ? nullptr : std::make_unique<Control::Busy>(*world_.control()); }

 private:
  World& world_;
  Device device_;
  Communicator& communicator_;
};

/// Does this rank's work; what it throws becomes known to all. Returns its exit code: 1 (or 2) where this or another rank failed,
/// kExitRankLost where one is lost; `tell` is told why. One rank alone passes exceptions on.
int together(World& world, const std::function<int()>& work, const std::function<void(const std::string& why)>& tell);
/// `tell` for programs that write nothing: one rank says it on stderr.
int together(World& world, const std::function<int()>& work);

/// Throws RankFailure on all ranks, with the first difference, if they do not have the same text.
void check_same(World& world, const std::string& what, const std::string& text);
/// Throws so where ranks have another version, config or kind of device. Returns the device. Needs no collective.
Device check_same_run(World& world, const RunConfig& config);
/// Compute threads of this rank where nothing says how many: those of its host are shared by the ranks there that may use the same.
/// Returns the number of those ranks.
int64_t share_threads(const RunConfig& config, World& world);

}  // namespace mesa
