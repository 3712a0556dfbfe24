#include "mesa/base/files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "mesa/base/error.h"

namespace mesa {
namespace {

struct Descriptor {
  // O_NONBLOCK: opening a pipe that nobody writes to must not wait for ever; a regular file does not know it.
  explicit Descriptor(const std::string& path) : fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {}
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int fd;
};

template <class Bytes>
Bytes read_whole(const std::string& path, int64_t limit) {
  const Descriptor file(path);
  check(file.fd >= 0, path, ": cannot be opened: ", std::strerror(errno));
  struct stat status {};
  check(::fstat(file.fd, &status) == 0, path, ": cannot be examined: ", std::strerror(errno));
  check(S_ISREG(status.st_mode), path, ": is not a file");
  check(status.st_size <= limit, path, ": has ", status.st_size, " bytes; at most ", limit, " are read");
  Bytes bytes;
  bytes.resize(static_cast<size_t>(status.st_size));
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t n = ::read(file.fd, bytes.data() + done, bytes.size() - done);
    if (n < 0 && errno == EINTR) continue;
    check(n >= 0, path, ": cannot be read: ", std::strerror(errno));
    check(n > 0, path, ": became shorter while it was read");
    done += static_cast<size_t>(n);
  }
  return bytes;
}

}  // namespace

std::vector<uint8_t> read_bytes(const std::string& path, int64_t limit) { return read_whole<std::vector<uint8_t>>(path, limit); }
std::string read_text(const std::string& path, int64_t limit) { return read_whole<std::string>(path, limit); }

}  // namespace mesa
