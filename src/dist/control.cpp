#include "mesa/dist/control.h"

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <optional>
#include <random>
#include <sstream>
#include <thread>

#include "mesa/base/threads.h"
#include "socket.h"

namespace mesa {

using net::Kind;
using net::Message;
using net::Peer;

Listener::Listener(int port) {
  std::tie(fd_, port_) = net::listen_at(port);
  if (port == 0) key_ = std::to_string(std::random_device{}());
}
Listener::~Listener() {
  if (fd_ >= 0) ::close(fd_);
}

std::string Listener::address() const {
  std::string out;
  for (const std::string& one : net::own_addresses()) out += (out.empty() ? "" : ",") + one;
  return concat(out, ":", port_, key_.empty() ? "" : "/", key_);
}

namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kPulse = std::chrono::seconds(1);
constexpr auto kMove = std::chrono::milliseconds(100);  // a rank that moves tells so, no more often: rank 0 hears and tells all
constexpr double kGrace = 5;                            // seconds for the main thread to leave by itself
constexpr double kPatience = 10;  // timeouts that a rank may be busy, or late for an exchange while others set themselves up
constexpr double kNotice = 1.5;   // seconds until rank 0 hears that another waits, and looks
constexpr int64_t kNobody = -1;
constexpr double kHurried = 5;  // seconds of silence that a process waits which is to end anyway

double seconds_since(Clock::time_point then) { return std::chrono::duration<double>(Clock::now() - then).count(); }

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
  std::optional<Peer> peer;
  std::string host = "?";
  Place place;
  Clock::time_point heard = Clock::now(), moved = Clock::now();  // since when it stands where it stands
  bool left = false;
  std::deque<std::string> texts;
};

std::string join(const std::vector<std::string>& texts) {
  std::string out;
  for (const std::string& text : texts) out += concat(text.size(), ":", text);
  return out;
}
std::vector<std::string> split(const std::string& joined) {
  std::vector<std::string> out;
  for (size_t at = 0; at < joined.size();) {
    const size_t colon = joined.find(':', at), size = std::stoull(joined.substr(at, colon - at));
    out.push_back(joined.substr(colon + 1, size));
    at = colon + 1 + size;
  }
  return out;
}

}  // namespace

class Control::Impl {
 public:
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
  bool welcomed_by(Peer& peer, double seconds);
  void watch();
  void take_in(int64_t rank, bool readable);
  void handle(int64_t rank, const Message& message);
  void look_for_silence();
  void look_for_stalls();
  void send_pulses();
  /// How long a rank waits in a collective, so that all are gone within the timeout; a short one is too little for that.
  double stall_limit() const { return std::max(timeout_ - kNotice - kGrace, 0.75 * timeout_); }
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

void Control::Impl::wait_for_all(const Listener& listener) {
  const auto start = Clock::now();
  int64_t missing = me_.world - 1;
  while (missing > 0) {
    if (seconds_since(start) > timeout_) {
      std::string list;
      for (int64_t r = 1; r < me_.world; ++r)
        if (!others_[static_cast<size_t>(r)].peer) list += concat(list.empty() ? "" : ", ", r);
      fail_run(
          concat("of ", me_.world, " ranks these did not come to rank 0 (", listener.address(), ") within ", timeout_, " seconds: ", list),
          kNobody);  // which those that came learn
      throw_now();
    }
    send_pulses();  // those that are there already wait for the others as long as this rank does
    auto peer = net::accept_from(listener.fd(), 1);
    if (!peer) continue;
    pollfd wait{peer->fd(), POLLIN, 0};
    std::optional<Message> hello;
    while (!hello && ::poll(&wait, 1, 2000) == 1 && peer->receive()) hello = peer->next();
    int64_t rank = 0, world = 0;
    std::string host, key;
    std::istringstream words(hello ? hello->body : "");
    if (!hello || hello->kind != Kind::hello || !(words >> rank >> world >> host)) continue;  // a stranger
    words >> key;
    if (key != listener.key()) continue;  // of another run
    check(world == me_.world, host, " takes part in a run of ", world, " ranks, and this one has ", me_.world);
    check(rank > 0 && rank < world && !others_[static_cast<size_t>(rank)].peer, "two processes are rank ", rank, " (", host, " and ",
          rank == 0 ? me_.host : others_[static_cast<size_t>(rank)].host, ")");
    Other& other = others_[static_cast<size_t>(rank)];
    other.host = host;
    peer->send(Kind::hello, me_.host);
    other.peer = std::move(peer);
    --missing;
  }
  for (Other& other : others_) other.heard = other.moved = Clock::now();
}

void Control::Impl::join_at(const std::string& address) {
  const auto start = Clock::now();
  const size_t slash = std::min(address.find('/'), address.size());
  const std::string places = address.substr(0, slash), key = slash < address.size() ? address.substr(slash + 1) : "";
  for (std::string why;;) {
    bool sent_away = false;
    for (const std::string& place : net::each_address(places)) {
      auto peer = net::connect_to(place, why);
      if (!peer) continue;
      peer->send(Kind::hello, concat(me_.rank, " ", me_.world, " ", me_.host, " ", key));
      if (welcomed_by(*peer, timeout_ - seconds_since(start))) {
        others_[0].peer = std::move(peer);
        return;
      }
      sent_away = true;
      why = concat(place, " does not take it in");
    }
    check(!sent_away && seconds_since(start) <= timeout_, "rank ", me_.rank, " (", me_.host, ") cannot reach rank 0 at ", places, ": ",
          why);
    std::this_thread::sleep_for(std::chrono::milliseconds(200));  // it may not listen yet
  }
}

/// False if the other end hangs up, or says nothing for so many seconds.
bool Control::Impl::welcomed_by(Peer& peer, double seconds) {
  const auto start = Clock::now();
  pollfd wait{peer.fd(), POLLIN, 0};
  while (seconds_since(start) <= seconds)
    if (::poll(&wait, 1, 1000) == 1) {
      const bool open = peer.receive();
      if (const auto welcome = peer.next()) {
        others_[0].host = welcome->body;
        others_[0].heard = Clock::now();
        return true;
      }
      if (!open) return false;
    }
  return false;
}

Control::Impl::~Impl() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    if (failure_.empty())
      for (Other& other : others_)
        if (other.peer) other.peer->send(Kind::goodbye, "");
  }
  if (thread_.joinable()) thread_.join();
}

std::vector<std::string> Control::Impl::exchange(const std::string& what, const std::string& mine) {
  std::unique_lock lock(mutex_);
  const auto limit = std::chrono::duration<double>(kPatience * timeout_);
  const auto arrived = [&](const Other& other) { return !other.texts.empty() || other.left; };
  if (!leads()) {
    Other& leader = others_[0];
    leader.peer->send(Kind::text, what + "\n" + mine);
    if (!changed_.wait_for(lock, limit + limit, [&] { return !failure_.empty() || arrived(leader); }))
      fail_run(concat(name(0), " does not come to the exchange of ", what, where(leader.place)), 0);
    throw_now();
    if (leader.texts.empty()) fail_run(concat(name(0), " left before the exchange of ", what, where(leader.place)), 0), throw_now();
    const std::string all = std::move(leader.texts.front());
    leader.texts.pop_front();
    return split(all);
  }
  changed_.wait_for(lock, limit, [&] { return !failure_.empty() || std::all_of(others_.begin() + 1, others_.end(), arrived); });
  std::vector<std::string> all{mine};
  for (int64_t r = 1; r < me_.world; ++r) {
    auto& texts = others_[static_cast<size_t>(r)].texts;
    const Place& place = others_[static_cast<size_t>(r)].place;
    if (texts.empty()) fail_run(concat(name(r), " does not come to the exchange of ", what, where(place)), r);
    throw_now();
    const size_t line = texts.front().find('\n');
    if (texts.front().substr(0, line) != what)
      fail_run(concat(name(r), " exchanges ", texts.front().substr(0, line), " while rank 0 exchanges ", what, where(place)), r, false);
    throw_now();
    all.push_back(texts.front().substr(line + 1));
    texts.pop_front();
  }
  for (Other& other : others_)
    if (other.peer) other.peer->send(Kind::text, join(all));
  return all;
}

void Control::Impl::watch() {
  auto pulsed = Clock::now() - kPulse;
  for (;;) {
    std::vector<pollfd> fds;
    std::vector<int64_t> ranks;
    {
      const std::lock_guard lock(mutex_);
      if (stop_) return;
      for (int64_t r = 0; r < me_.world; ++r)
        if (const Other& other = others_[static_cast<size_t>(r)]; other.peer && !other.left) {
          fds.push_back({other.peer->fd(), POLLIN, 0});
          ranks.push_back(r);
        }
    }
    ::poll(fds.data(), fds.size(), 100);
    const std::lock_guard lock(mutex_);
    for (size_t i = 0; i < fds.size(); ++i) take_in(ranks[i], fds[i].revents != 0);
    place_.signal = std::max(place_.signal, asked_());
    const auto since = Clock::now() - pulsed;
    if (since >= kPulse || (since >= kMove && !(told_ == place_))) {
      pulsed = Clock::now(), told_ = place_;
      send_pulses();
    }
    if (failure_.empty()) look_for_silence();
    if (failure_.empty() && leads()) look_for_stalls();
    end_if_stuck();
  }
}

void Control::Impl::take_in(int64_t rank, bool readable) {
  if (!readable) return;
  Other& other = others_[static_cast<size_t>(rank)];
  const bool open = other.peer->receive();
  while (const auto message = other.peer->next()) handle(rank, *message);
  if (open || other.left) return;
  other.left = true;
  fail_run(concat(name(rank), " died", where(other.place)), rank);
}

void Control::Impl::handle(int64_t rank, const Message& message) {
  Other& other = others_[static_cast<size_t>(rank)];
  other.heard = Clock::now();
  switch (message.kind) {
    case Kind::pulse: {
      const Place place = Place::parse(message.body);
      if (!(place == other.place)) other.moved = Clock::now();
      other.place = place;
      place_.signal = std::max(place_.signal, place.signal);
      break;
    }
    case Kind::text: other.texts.push_back(message.body); break;
    case Kind::failure: {
      int64_t culprit = kNobody;  // "<culprit> <lost> <reason>"
      bool lost = true;
      std::istringstream words(message.body);
      words >> culprit >> lost;
      words.get();
      fail_run(std::string(std::istreambuf_iterator<char>(words), {}), culprit, lost);
      break;
    }
    case Kind::goodbye: other.left = true; break;
    case Kind::hello: break;
  }
  changed_.notify_all();
}

void Control::Impl::send_pulses() {
  for (Other& other : others_)
    if (other.peer && !other.left) other.peer->send(Kind::pulse, place_.text());  // one that takes nothing is silent soon
}

void Control::Impl::look_for_silence() {
  const double patience = asked_() != 0 ? std::min(kHurried, timeout_ / 2) : timeout_ / 2;
  for (int64_t r = 0; r < me_.world; ++r) {
    const Other& other = others_[static_cast<size_t>(r)];
    if (!other.peer || other.left || seconds_since(other.heard) <= patience) continue;
    return fail_run(
        concat(name(r), " has not answered for ", static_cast<int64_t>(seconds_since(other.heard)), " seconds", where(other.place)), r);
  }
}

/// A rank that waits too long in a collective: for one that did not come, or for the network.
void Control::Impl::look_for_stalls() {
  const auto place_of = [&](int64_t r) { return r == 0 ? place_ : others_[static_cast<size_t>(r)].place; };
  bool busy = false;
  for (int64_t r = 0; r < me_.world; ++r) busy = busy || place_of(r).busy > 0;
  if (!busy) busy_since_ = Clock::now();
  if (busy && seconds_since(busy_since_) < kPatience * timeout_) {
    last_busy_ = Clock::now();
    return;
  }
  const auto age_of = [&](int64_t r) {
    return std::min(seconds_since(last_busy_), seconds_since(r == 0 ? moved_ : others_[static_cast<size_t>(r)].moved));
  };
  int64_t first = -1;
  for (int64_t r = 0; r < me_.world; ++r) {
    if (place_of(r).waiting > 0 && age_of(r) > stall_limit() && (first < 0 || place_of(r).collective > place_of(first).collective))
      first = r;
  }
  if (first < 0) return;
  const int64_t collective = place_of(first).collective;
  for (int64_t r = 0; r < me_.world; ++r)
    if (place_of(r).collective < collective)
      return fail_run(concat(name(r), " has not come to collective ", collective, ", in which ", name(first), " has waited for ",
                             static_cast<int64_t>(age_of(first)), " seconds", where(place_of(r))),
                      culprit_for(r));
  fail_run(concat("all ranks are in collective ", collective, " and it does not end: is there a way for MPI or NCCL between all hosts?"),
           kNobody);
}

/// The first reason counts, and everybody learns it.
void Control::Impl::fail_run(const std::string& reason, int64_t culprit, bool lost) {
  if (!failure_.empty()) return;
  failure_ = reason, lost_ = lost;
  culprit_ = culprit;
  failed_at_ = Clock::now();
  for (Other& other : others_)
    if (other.peer && !other.left) other.peer->send(Kind::failure, concat(culprit, " ", lost, " ", reason));
  changed_.notify_all();
}

/// A main thread that waits in a library cannot be called back.
void Control::Impl::end_if_stuck() {
  const double grace = place_.busy > 0 ? timeout_ : kGrace;  // a checkpoint that is being written becomes whole
  if (failure_.empty() || seconds_since(failed_at_) < grace) return;
  if (speaks()) std::fprintf(stderr, "error: %s\n", failure_.c_str());
  _exit(failure().exit_code());
}

Control::Control(const RankInfo& me, const Listener& listener, double timeout) : impl_(std::make_unique<Impl>(me, timeout)) {
  try {
    impl_->wait_for_all(listener);
  } catch (const Error& e) {
    impl_->report(e.what(), false);  // to those that came
    throw;
  }
  impl_->start();
}
Control::Control(const RankInfo& me, const std::string& address, double timeout) : impl_(std::make_unique<Impl>(me, timeout)) {
  impl_->join_at(address);
  impl_->start();
}
Control::~Control() = default;
std::vector<std::string> Control::exchange(const std::string& what, const std::string& mine) { return impl_->exchange(what, mine); }
void Control::at_step(int64_t step) {
  impl_->move([&](Place& place) { place.step = step; });
}
void Control::at_collective(int64_t collective, bool waiting) {
  impl_->move([&](Place& place) { place.collective = collective, place.waiting = waiting ? 1 : 0; });
}
Control::Busy::Busy(Control& control) : control_(control) {
  control.impl_->move([](Place& place) { ++place.busy; });
}
Control::Busy::~Busy() {
  control_.impl_->move([](Place& place) { --place.busy; });
}
RankFailure Control::report(const std::string& reason, bool lost) { return impl_->report(reason, lost); }
void Control::hear_signals(std::function<int64_t()> asked) { impl_->hear_signals(std::move(asked)); }
int64_t Control::signal() { return impl_->signal(); }
bool Control::failed() { return impl_->failed(); }
bool Control::speaks() { return impl_->speaks_now(); }
void Control::throw_if_failed(double seconds) { impl_->throw_if_failed(seconds); }
double Control::silence() const { return impl_->silence(); }

}  // namespace mesa
