#include "mesa/dist/control.h"

#include <algorithm>

#include "control_impl.h"

namespace mesa {

using net::Kind;

namespace {

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
  impl_->move([&](Impl::Place& place) { place.step = step; });
}
void Control::at_collective(int64_t collective, bool waiting) {
  impl_->move([&](Impl::Place& place) { place.collective = collective, place.waiting = waiting ? 1 : 0; });
}
Control::Busy::Busy(Control& control) : control_(control) {
  control.impl_->move([](Impl::Place& place) { ++place.busy; });
}
Control::Busy::~Busy() {
  control_.impl_->move([](Impl::Place& place) { --place.busy; });
}
RankFailure Control::report(const std::string& reason, bool lost) { return impl_->report(reason, lost); }
void Control::hear_signals(std::function<int64_t()> asked) { impl_->hear_signals(std::move(asked)); }
int64_t Control::signal() { return impl_->signal(); }
bool Control::failed() { return impl_->failed(); }
bool Control::speaks() { return impl_->speaks_now(); }
void Control::throw_if_failed(double seconds) { impl_->throw_if_failed(seconds); }
double Control::silence() const { return impl_->silence(); }

}  // namespace mesa
