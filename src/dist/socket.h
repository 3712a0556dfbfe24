// TCP connections that carry small framed messages.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace mesa::net {

/// What a message is for.
enum class Kind : uint8_t { hello = 1, text = 2, pulse = 3, failure = 4, goodbye = 5 };

struct Message {
  Kind kind;
  std::string body;
};

/// One end of a connection. Sends block for a few seconds at most; what arrives is taken in without waiting.
class Peer {
 public:
  explicit Peer(int fd);
  ~Peer();
  Peer(Peer&& other) noexcept;
  Peer& operator=(Peer&& other) noexcept;
  int fd() const { return fd_; }
  /// False if the other end is gone or takes nothing.
  bool send(Kind kind, const std::string& body);
  /// Reads what is there. False at the end of the connection, or if it does not speak our language.
  bool receive();
  /// The next whole message that was received.
  std::optional<Message> next();

 private:
  int fd_;
  std::string input_;
};

/// "a,b:port" as "a:port" and "b:port".
std::vector<std::string> each_address(const std::string& addresses);
/// A connected peer, or nothing and the reason in `why`; tries "host:port" for a short while.
std::optional<Peer> connect_to(const std::string& address, std::string& why);
/// The next connection within `seconds`, if one comes.
std::optional<Peer> accept_from(int listener, double seconds);
/// A listening socket and its port. Throws Error.
std::pair<int, int> listen_at(int port);
/// The addresses of this host; the loopback ones only where it has no others.
std::vector<std::string> own_addresses();

}  // namespace mesa::net
