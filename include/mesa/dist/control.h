// The wire that keeps ranks together beside their collectives: who is there, where each stands, and what went wrong with whom.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "mesa/base/error.h"

namespace mesa {

/// One process of a run.
struct RankInfo {
  int64_t rank = 0, world = 1;
  int64_t local_rank = 0;  ///< among those of its host: selects the GPU
  std::string host;
};

/// Exit code of a rank that ends because another one is lost (EX_UNAVAILABLE).
inline constexpr int kExitRankLost = 69;

/// A rank ended the run for all; the text names it. It is lost (died, stopped answering, did not come), and may be there the next time; or
/// it failed, and will again until the cause is mended. Whoever catches this has nothing to save.
class RankFailure : public Error {
 public:
  explicit RankFailure(const std::string& text, bool lost = true) : Error(text), lost_(lost) {}
  bool lost() const { return lost_; }
  int exit_code() const { return lost_ ? kExitRankLost : 1; }

 private:
  bool lost_;
};

/// A socket of rank 0 that the others will connect to.
class Listener {
 public:
  /// Port 0 takes any free one. Throws Error with the reason.
  explicit Listener(int port = 0);
  ~Listener();
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;
  int port() const { return port_; }
  int fd() const { return fd_; }
  /// "10.0.0.1,192.168.0.1:4711/8f14e45f": every address of this host, for ranks on any network that they share, and a key. An address may
  /// lead elsewhere to another host (each has its own 172.17.0.1), where another run listens: that one refuses the key.
  std::string address() const;
  /// Empty where the port was given: others know it without having asked.
  const std::string& key() const { return key_; }

 private:
  int fd_ = -1, port_ = 0;
  std::string key_;
};

/// A star of TCP connections around rank 0. A thread of its own sends where this rank stands each second and watches the others, so that
/// a rank that dies (its connection ends) or hangs (it stays silent, or does not come to a collective that others wait in) is noticed
/// within `timeout` seconds. All ranks then learn which it was: waiting code sees it through throw_if_failed(), and a process whose main
/// thread does not leave by itself within 5 seconds is ended, which is within `timeout`, too, from 26 seconds on.
class Control {
 public:
  /// Waits for all ranks. Rank 0 passes its listener, the others the address of it ("HOST[,HOST..]:PORT[/KEY]"). Throws RankFailure that
  /// names the ranks that did not come, or Error with the address that did not answer.
  Control(const RankInfo& me, const Listener& listener, double timeout);
  Control(const RankInfo& me, const std::string& address, double timeout);
  /// Says goodbye: the others do not take the end of this process for a failure.
  ~Control();
  Control(const Control&) = delete;
  Control& operator=(const Control&) = delete;

  /// Everybody's text, by rank. All ranks must call it alike: `what` (a few words) says which exchange it is, and is compared.
  std::vector<std::string> exchange(const std::string& what, const std::string& mine);
  /// Where this rank stands, for reports and to find who is missing. `collective` counts those begun, `waiting` that this rank is in one.
  void at_step(int64_t step);
  void at_collective(int64_t collective, bool waiting);
  /// While this lives the rank may let others wait longer than the timeout: it saves a checkpoint, say.
  class Busy {
   public:
    explicit Busy(Control& control);
    ~Busy();
    Busy(const Busy&) = delete;
    Busy& operator=(const Busy&) = delete;

   private:
    Control& control_;
  };
  /// Tells all ranks that this one ends, and why (`lost`: of the loss of another one). Returns what the run ends of: this, with the rank's
  /// name and place, or what came first.
  RankFailure report(const std::string& reason, bool lost = false);
  bool failed();
  /// `asked` (called from another thread) tells the number of the signal that asks this process to end, or 0. From then on silent ranks are
  /// given up after a few seconds: a launcher that lost a host ends its processes, and they have little time left to say why.
  void hear_signals(std::function<int64_t()> asked);
  /// The signal that some rank has received, 0 if none is known of: the wire tells it to all within a moment, not to all at once. Where
  /// work in common is divided unevenly, all can leave it soon, and agree on that afterwards.
  int64_t signal();
  /// After a failure: whether this is the rank that tells the user. One message is enough, and one a host where rank 0 is lost.
  bool speaks();
  /// Throws RankFailure if the run has failed, or fails within so many seconds: where a rank is lost, a library may complain before the
  /// wire knows, and what the wire says is the reason.
  void throw_if_failed(double seconds = 0);
  /// Within so many seconds the wire knows of a rank that died, or of one that fell silent.
  static constexpr double kDeath = 3;
  double silence() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace mesa
