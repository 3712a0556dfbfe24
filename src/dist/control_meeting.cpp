// How ranks find each other: rank 0 listens, the others come to it.
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <random>
#include <tuple>

#include "control_impl.h"

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

}  // namespace mesa
