// How ranks know of each other while they work: each tells where it stands, and who stays silent or does not come ends the run.
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "control_impl.h"

namespace mesa {

using net::Kind;
using net::Message;

namespace {

constexpr auto kPulse = std::chrono::seconds(1);
constexpr auto kMove = std::chrono::milliseconds(100);  // a rank that moves tells so, no more often: rank 0 hears and tells all
constexpr double kGrace = 5;                            // seconds for the main thread to leave by itself
constexpr double kNotice = 1.5;                         // seconds until rank 0 hears that another waits, and looks
constexpr double kHurried = 5;                          // seconds of silence that a process waits which is to end anyway

}  // namespace

/// How long a rank waits in a collective, so that all are gone within the timeout; a short one is too little for that.
double Control::Impl::stall_limit() const { return std::max(timeout_ - kNotice - kGrace, 0.75 * timeout_); }

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

}  // namespace mesa
