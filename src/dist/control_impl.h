// What Control is made of: what each rank knows of the others, for its three parts, meeting, exchanging and watching.
#pragma once
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <sstream>
#include <thread>

#include "mesa/base/threads.h"
#include "mesa/dist/control.h"
#include "socket.h"

namespace mesa {

using Clock = std::chrono::steady_clock;
inline constexpr double kPatience = 10;  // timeouts that a rank may be busy, or late for an exchange while others set themselves up
inline constexpr int64_t kNobody = -1;

inline double seconds_since(Clock::time_point then) { return std::chrono::duration<double>(Clock::now() - then).count(); }

class Control::Impl {
 public:
  /// Where a rank stands.
  struct Place {
    int64_t step = 0, collective = 0;
    int waiting = 0, busy = 0;
    int64_t signal = 0;  // that it knows of, its own or another rank's
    bool operator==(const Place&) const = default;

    std::string text() const { return concat(step, " ", collective, " ", waiting, " ", busy, " ", signal); }
    static Place parse(const std::string& text) {
      Place place;
      std::istringstream(text) >> place.step >> place.collective >> place.waiting >> place.busy >> place.signal;
      return place;
    }
  };

  /// What is known of another rank.
  struct Other {
    std::optional<net::Peer> peer;
    std::string host = "?";
    Place place;
    Clock::time_point heard = Clock::now(), moved = Clock::now();  // since when it stands where it stands
    bool left = false;
    std::deque<std::string> texts;
  };

  Impl(const RankInfo& me, double timeout) : me_(me), timeout_(timeout), others_(static_cast<size_t>(me.world)) {}
  ~Impl();
  void wait_for_all(const Listener& listener);
  void join_at(const std::string& address);
  void start() {
    const SignalsBlocked blocked;
    thread_ = std::thread([this] { watch(); });
  }
  std::vector<std::string> exchange(const std::string& what, const std::string& mine);
  template <class F>
  void move(F&& change) {
    const std::lock_guard lock(mutex_);
    change(place_);
    moved_ = Clock::now();
  }
  RankFailure report(const std::string& reason, bool lost) {
    const std::lock_guard lock(mutex_);
    fail_run(concat(name(me_.rank), " failed at step ", place_.step, ", collective ", place_.collective, ": ", reason),
             culprit_for(me_.rank), lost);
    return failure();
  }
  /// The leader does, or where it is lost the first rank of each host: its side may be cut off from the others.
  bool speaks() const {
    if (culprit_ != 0) return leads();
    return !leads() && (me_.local_rank == 0 || (me_.local_rank == 1 && me_.host == others_[0].host));
  }
  void hear_signals(std::function<int64_t()> asked) {
    const std::lock_guard lock(mutex_);
    asked_ = std::move(asked);
  }
  int64_t signal() {
    const std::lock_guard lock(mutex_);
    return place_.signal;
  }
  bool failed() {
    const std::lock_guard lock(mutex_);
    return !failure_.empty();
  }
  bool speaks_now() {
    const std::lock_guard lock(mutex_);
    return speaks();
  }
  void throw_if_failed(double seconds) {
    std::unique_lock lock(mutex_);
    if (seconds > 0) changed_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return !failure_.empty(); });
    throw_now();
  }
  double silence() const { return timeout_ / 2 + kDeath; }

 private:
  bool leads() const { return me_.rank == 0; }
  /// Of what the leader finds: it is there to tell the fault, also its own.
  int64_t culprit_for(int64_t rank) const { return rank == 0 && leads() ? kNobody : rank; }
  std::string name(int64_t rank) const {
    const std::string& host = rank == me_.rank ? me_.host : others_[static_cast<size_t>(rank)].host;
    return concat("rank ", rank, " (", host, ")");
  }
  std::string where(const Place& place) const { return concat(", last heard of at step ", place.step, ", collective ", place.collective); }
  RankFailure failure() const { return RankFailure(failure_, lost_); }
  void throw_now() const {
    if (!failure_.empty()) throw failure();
  }
  bool welcomed_by(net::Peer& peer, double seconds);
  void watch();
  void take_in(int64_t rank, bool readable);
  void handle(int64_t rank, const net::Message& message);
  void look_for_silence();
  void look_for_stalls();
  void send_pulses();
  double stall_limit() const;
  void fail_run(const std::string& reason, int64_t culprit, bool lost = true);
  void end_if_stuck();

  const RankInfo me_;
  const double timeout_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Other> others_;  // rank 0 has connections to all, the others one to rank 0
  Place place_, told_;
  Clock::time_point moved_ = Clock::now();
  Clock::time_point busy_since_ = Clock::now(), last_busy_ = Clock::now();
  std::string failure_;
  int64_t culprit_ = kNobody;
  bool lost_ = true;  // or failed
  Clock::time_point failed_at_;
  std::function<int64_t()> asked_ = [] { return 0; };
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace mesa
