#include "star.h"

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <set>

#include "mesa/base/dtype.h"

namespace mesa::emulation {
namespace {

sockaddr_in loopback(int port) {
  sockaddr_in at{};
  at.sin_family = AF_INET;
  at.sin_port = htons(static_cast<uint16_t>(port));
  at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return at;
}

/// Small messages one after the other must not wait for the other side's acknowledgement, 40 ms each.
void send_at_once(int fd) {
  const int yes = 1;
  ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
}

[[noreturn]] void lost() { throw NcclFailure{ncclRemoteError, "emulated: connection closed by remote peer"}; }

void send_all(int fd, const void* data, size_t bytes) {
  const auto* at = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = ::send(fd, at, bytes, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) lost();
    at += n, bytes -= static_cast<size_t>(n);
  }
}

void receive_all(int fd, void* data, size_t bytes) {
  auto* at = static_cast<char*>(data);
  while (bytes > 0) {
    const ssize_t n = ::recv(fd, at, bytes, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) lost();
    at += n, bytes -= static_cast<size_t>(n);
  }
}

template <class T>
void add(std::vector<char>& sum, const std::vector<char>& more) {
  for (size_t at = 0; at + sizeof(T) <= sum.size(); at += sizeof(T)) {
    T a, b;
    std::memcpy(&a, sum.data() + at, sizeof a), std::memcpy(&b, more.data() + at, sizeof b);
    a = static_cast<T>(a + b);
    std::memcpy(sum.data() + at, &a, sizeof a);
  }
}

void add(ncclDataType_t type, std::vector<char>& sum, const std::vector<char>& more) {
  switch (type) {
    case ncclFloat32: return add<float>(sum, more);
    case ncclFloat64: return add<double>(sum, more);
    case ncclBfloat16: return add<bf16>(sum, more);
    case ncclInt64: return add<int64_t>(sum, more);
    default: throw NcclFailure{ncclInvalidArgument, "emulated: no sum of this type"};
  }
}

/// What rank `r` gets of what all gave together.
std::vector<char> share(const Call& call, const std::vector<char>& all, int r, int ranks) {
  if (call.what != Collective::reduce_scatter) return all;
  const auto part = static_cast<ptrdiff_t>(all.size()) / ranks;
  return {all.begin() + part * r, all.begin() + part * (r + 1)};
}

}  // namespace

Listening listen_on_loopback() {
  const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in at = loopback(0);
  socklen_t size = sizeof at;
  if (fd < 0 || ::bind(fd, reinterpret_cast<sockaddr*>(&at), size) != 0 || ::listen(fd, 64) != 0 ||
      ::getsockname(fd, reinterpret_cast<sockaddr*>(&at), &size) != 0)
    throw NcclFailure{ncclSystemError, "emulated: no socket"};
  return {fd, ntohs(at.sin_port)};
}

Star::Star(int rank, int ranks) : rank_(rank), ranks_(ranks), others_(static_cast<size_t>(ranks)) {
  for (std::atomic<int>& fd : others_) fd = -1;
}
Star::~Star() {
  for (const int fd : others_)
    if (fd >= 0) ::close(fd);
}

void Star::cut() {
  cut_ = true;
  for (const int fd : others_)
    if (fd >= 0) ::shutdown(fd, SHUT_RDWR);
}

void Star::say(int other, const NcclFailure& verdict, const std::vector<char>& bytes) {
  const uint64_t sizes[] = {static_cast<uint64_t>(verdict.code), verdict.words.size(), bytes.size()};
  send_all(others_[static_cast<size_t>(other)], sizes, sizeof sizes);
  send_all(others_[static_cast<size_t>(other)], verdict.words.data(), verdict.words.size());
  send_all(others_[static_cast<size_t>(other)], bytes.data(), bytes.size());
}

void Star::hear(int other, std::vector<char>& bytes) {
  uint64_t sizes[3];
  receive_all(others_[static_cast<size_t>(other)], sizes, sizeof sizes);
  std::string words(sizes[1], '\0');
  receive_all(others_[static_cast<size_t>(other)], words.data(), words.size());
  bytes.resize(sizes[2]);
  receive_all(others_[static_cast<size_t>(other)], bytes.data(), bytes.size());
  if (sizes[0] != ncclSuccess) throw NcclFailure{static_cast<ncclResult_t>(sizes[0]), words};
}

void Star::connect(const Listening& at, int gpu) {
  std::vector<char> ignored;
  if (rank_ != 0) {
    const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const sockaddr_in to = loopback(at.port);
    if (::connect(fd, reinterpret_cast<const sockaddr*>(&to), sizeof to) != 0)
      throw NcclFailure{ncclSystemError, "emulated: no connection"};
    send_at_once(fd);
    others_[0] = fd;
    const int32_t hello[] = {rank_, gpu};
    send_all(fd, hello, sizeof hello);
    return hear(0, ignored);
  }
  std::set<int> used{gpu};
  NcclFailure verdict{ncclSuccess, ""};
  for (int missing = ranks_ - 1; missing > 0;) {
    pollfd wait{at.fd, POLLIN, 0};
    if (cut_) lost();
    if (::poll(&wait, 1, 50) != 1) continue;
    const int fd = ::accept4(at.fd, nullptr, nullptr, SOCK_CLOEXEC);
    int32_t hello[2];
    receive_all(fd, hello, sizeof hello);
    send_at_once(fd);
    others_[static_cast<size_t>(hello[0])] = fd;
    if (!used.insert(hello[1]).second) verdict = {ncclInvalidUsage, "emulated: two ranks use the GPU " + std::to_string(hello[1])};
    --missing;
  }
  for (int r = 1; r < ranks_; ++r) say(r, verdict);
  if (verdict.code != ncclSuccess) throw verdict;
}

std::vector<char> Star::run(const Call& call, const std::vector<char>& given) {
  if (rank_ == 0) return lead(call, given);
  std::vector<char> bytes(sizeof call + given.size());
  std::memcpy(bytes.data(), &call, sizeof call);
  std::copy(given.begin(), given.end(), bytes.begin() + sizeof call);
  say(0, {ncclSuccess, ""}, bytes);
  hear(0, bytes);
  return bytes;
}

std::vector<char> Star::lead(const Call& call, const std::vector<char>& given) {
  const bool adds = call.what == Collective::all_reduce || call.what == Collective::reduce_scatter;
  std::vector<char> all = given, more;
  NcclFailure verdict{ncclSuccess, ""};
  for (int r = 1; r < ranks_; ++r) {
    hear(r, more);
    Call theirs{};
    std::memcpy(&theirs, more.data(), sizeof theirs);
    more.erase(more.begin(), more.begin() + sizeof theirs);
    if (!(theirs == call)) {
      verdict = {ncclInvalidUsage, "emulated: rank " + std::to_string(r) + " asks for another collective than rank 0"};
    } else if (adds) {
      add(call.type, all, more);
    } else if (call.what == Collective::all_gather) {
      all.insert(all.end(), more.begin(), more.end());
    } else if (call.what == Collective::broadcast && call.root == r) {
      all = more;
    }
  }
  for (int r = 1; r < ranks_; ++r) say(r, verdict, share(call, all, r, ranks_));
  if (verdict.code != ncclSuccess) throw verdict;
  return share(call, all, 0, ranks_);
}

}  // namespace mesa::emulation
