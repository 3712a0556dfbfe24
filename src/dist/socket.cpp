#include "socket.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <sstream>
#include <utility>

#include "mesa/base/error.h"

namespace mesa::net {
namespace {

constexpr uint32_t kMagic = 0x4153454d;     // "MESA": a stranger on our port is sent away
constexpr uint32_t kMostBytes = 1 << 20;    // of a message
constexpr int kConnectMilliseconds = 2000;  // for each address
constexpr timeval kSendTime{5, 0};

struct Header {
  uint32_t magic, bytes;
  uint8_t kind;
} __attribute__((packed));

void set_options(int fd) {
  const int yes = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &kSendTime, sizeof kSendTime);
}

/// Connects without waiting longer than it should; -1 and errno if it cannot.
int connect_one(const addrinfo& to) {
  const int fd = ::socket(to.ai_family, to.ai_socktype | SOCK_CLOEXEC | SOCK_NONBLOCK, to.ai_protocol);
  if (fd < 0) return -1;
  int error = ::connect(fd, to.ai_addr, to.ai_addrlen) == 0 ? 0 : errno;
  if (error == EINPROGRESS) {
    pollfd wait{fd, POLLOUT, 0};
    socklen_t size = sizeof error;
    if (::poll(&wait, 1, kConnectMilliseconds) != 1)
      error = ETIMEDOUT;
    else
      getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size);
  }
  if (error != 0) {
    ::close(fd);
    errno = error;
    return -1;
  }
  fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
  return fd;
}

}  // namespace

Peer::Peer(int fd) : fd_(fd) { set_options(fd); }
Peer::~Peer() {
  if (fd_ >= 0) ::close(fd_);
}
Peer::Peer(Peer&& other) noexcept : fd_(std::exchange(other.fd_, -1)), input_(std::move(other.input_)) {}
Peer& Peer::operator=(Peer&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(input_, other.input_);
  return *this;
}

bool Peer::send(Kind kind, const std::string& body) {
  const Header header{kMagic, static_cast<uint32_t>(body.size()), static_cast<uint8_t>(kind)};
  std::string bytes(reinterpret_cast<const char*>(&header), sizeof header);
  bytes += body;
  for (size_t sent = 0; sent < bytes.size();) {
    const ssize_t n = ::send(fd_, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      ::shutdown(fd_, SHUT_RDWR);  // half a message may be out: nothing can follow it
      return false;
    }
    sent += static_cast<size_t>(n);
  }
  return true;
}

bool Peer::receive() {
  char bytes[4096];
  for (;;) {
    const ssize_t n = ::recv(fd_, bytes, sizeof bytes, MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return errno == EAGAIN || errno == EWOULDBLOCK;
    if (n == 0) return false;
    input_.append(bytes, static_cast<size_t>(n));
    Header header;
    if (input_.size() < sizeof header) continue;
    std::memcpy(&header, input_.data(), sizeof header);
    if (header.magic != kMagic || header.bytes > kMostBytes) return false;
  }
}

std::optional<Message> Peer::next() {
  Header header;
  if (input_.size() < sizeof header) return std::nullopt;
  std::memcpy(&header, input_.data(), sizeof header);
  if (header.magic != kMagic || input_.size() < sizeof header + header.bytes) return std::nullopt;
  Message message{static_cast<Kind>(header.kind), input_.substr(sizeof header, header.bytes)};
  input_.erase(0, sizeof header + header.bytes);
  return message;
}

std::vector<std::string> each_address(const std::string& addresses) {
  const size_t colon = addresses.rfind(':');
  check(colon != std::string::npos, "'", addresses, "' is not HOST:PORT");
  std::vector<std::string> each;
  std::istringstream hosts(addresses.substr(0, colon));
  for (std::string host; std::getline(hosts, host, ',');) each.push_back(host + addresses.substr(colon));
  return each;
}

std::optional<Peer> connect_to(const std::string& address, std::string& why) {
  const size_t colon = address.rfind(':');
  const std::string host = address.substr(0, colon), port = address.substr(colon + 1);
  addrinfo hints{}, *found = nullptr;
  hints.ai_socktype = SOCK_STREAM;
  if (const int code = getaddrinfo(host.c_str(), port.c_str(), &hints, &found); code != 0) {
    why = concat(host, ": ", gai_strerror(code));
    return std::nullopt;
  }
  const std::unique_ptr<addrinfo, void (*)(addrinfo*)> owner(found, freeaddrinfo);
  for (const addrinfo* one = found; one != nullptr; one = one->ai_next) {
    if (const int fd = connect_one(*one); fd >= 0) return Peer(fd);
    why = concat(address, ": ", std::strerror(errno));
  }
  return std::nullopt;
}

std::optional<Peer> accept_from(int listener, double seconds) {
  pollfd wait{listener, POLLIN, 0};
  if (::poll(&wait, 1, static_cast<int>(std::max(0.0, seconds) * 1000)) != 1) return std::nullopt;
  const int fd = ::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
  if (fd < 0) return std::nullopt;
  return Peer(fd);
}

std::pair<int, int> listen_at(int port) {
  addrinfo hints{}, *found = nullptr;
  hints.ai_family = AF_UNSPEC, hints.ai_socktype = SOCK_STREAM, hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  const int code = getaddrinfo(nullptr, std::to_string(port).c_str(), &hints, &found);
  check(code == 0, "rank 0 cannot listen on port ", port, ": ", gai_strerror(code));
  const std::unique_ptr<addrinfo, void (*)(addrinfo*)> owner(found, freeaddrinfo);
  std::string why;
  for (const int family : {AF_INET6, AF_INET})  // an IPv6 socket takes IPv4 connections, too, but not every host has IPv6
    for (const addrinfo* one = found; one != nullptr; one = one->ai_next) {
      if (one->ai_family != family) continue;
      const int fd = ::socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0), yes = 1, no = 0;
      setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
      if (family == AF_INET6) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof no);
      sockaddr_storage at{};
      socklen_t size = sizeof at;
      if (fd >= 0 && ::bind(fd, one->ai_addr, one->ai_addrlen) == 0 && ::listen(fd, 1024) == 0 &&
          ::getsockname(fd, reinterpret_cast<sockaddr*>(&at), &size) == 0)
        return {fd,
                ntohs(family == AF_INET6 ? reinterpret_cast<sockaddr_in6&>(at).sin6_port : reinterpret_cast<sockaddr_in&>(at).sin_port)};
      why = std::strerror(errno);
      if (fd >= 0) ::close(fd);
    }
  fail("rank 0 cannot listen on port ", port, ": ", why);
}

std::vector<std::string> own_addresses() {
  ifaddrs* all = nullptr;
  if (getifaddrs(&all) != 0) return {"127.0.0.1"};
  const std::unique_ptr<ifaddrs, void (*)(ifaddrs*)> owner(all, freeifaddrs);
  std::vector<std::string> outside, loopback;
  for (const ifaddrs* one = all; one != nullptr; one = one->ifa_next) {
    if (one->ifa_addr == nullptr || (one->ifa_addr->sa_family != AF_INET && one->ifa_addr->sa_family != AF_INET6) ||
        (one->ifa_flags & IFF_UP) == 0)
      continue;
    char text[INET6_ADDRSTRLEN];
    const bool six = one->ifa_addr->sa_family == AF_INET6;
    const void* bytes = six ? static_cast<const void*>(&reinterpret_cast<const sockaddr_in6*>(one->ifa_addr)->sin6_addr)
                            : &reinterpret_cast<const sockaddr_in*>(one->ifa_addr)->sin_addr;
    if (six && IN6_IS_ADDR_LINKLOCAL(static_cast<const in6_addr*>(bytes))) continue;  // means nothing without the interface
    inet_ntop(one->ifa_addr->sa_family, bytes, text, sizeof text);
    ((one->ifa_flags & IFF_LOOPBACK) != 0 ? loopback : outside).emplace_back(text);
  }
  return outside.empty() ? loopback : outside;  // elsewhere a loopback address is another host
}

}  // namespace mesa::net
