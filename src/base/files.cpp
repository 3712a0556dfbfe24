#include "mesa/base/files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

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

/// Bytes of an open file, which must be a regular one.
int64_t size_of(const Descriptor& file, const std::string& path) {
  check(file.fd >= 0, path, ": cannot be opened: ", std::strerror(errno));
  struct stat status {};
  check(::fstat(file.fd, &status) == 0, path, ": cannot be examined: ", std::strerror(errno));
  check(S_ISREG(status.st_mode), path, ": is not a file");
  return status.st_size;
}

template <class Bytes>
Bytes read_whole(const std::string& path, int64_t limit) {
  const Descriptor file(path);
  const int64_t size = size_of(file, path);
  check(size <= limit, path, ": has ", size, " bytes; at most ", limit, " are read");
  Bytes bytes;
  bytes.resize(static_cast<size_t>(size));
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

InputFile::InputFile(const std::string& path) : path_(path), fd_(-1) {
  Descriptor file(path);
  size_ = static_cast<uint64_t>(size_of(file, path));
  fd_ = std::exchange(file.fd, -1);
}

InputFile::~InputFile() {
  if (fd_ >= 0) ::close(fd_);
}

InputFile::InputFile(InputFile&& other) noexcept : path_(std::move(other.path_)), fd_(std::exchange(other.fd_, -1)), size_(other.size_) {}

void InputFile::read(uint64_t offset, uint8_t* to, size_t count) const {
  size_t done = 0;
  while (done < count) {
    const ssize_t n = ::pread(fd_, to + done, count - done, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    check(n >= 0, path_, ": cannot be read: ", std::strerror(errno));
    check(n > 0, path_, ": became shorter while it was read");
    done += static_cast<size_t>(n);
  }
}

MappedFile::MappedFile(const std::string& path) : path_(path) {
  const Descriptor file(path);
  const auto size = static_cast<size_t>(size_of(file, path));
  check(size > 0, path, ": is empty");
  void* at = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, file.fd, 0);
  check(at != MAP_FAILED, path, ": cannot be mapped into memory: ", std::strerror(errno));
  bytes_ = {static_cast<const uint8_t*>(at), size};
  ::madvise(at, size, MADV_RANDOM);  // records come in random order: what lies behind one is not wanted
}

MappedFile::~MappedFile() { ::munmap(const_cast<uint8_t*>(bytes_.data()), bytes_.size()); }

void MappedFile::fetch(uint64_t offset, uint64_t count) const {
#ifdef MADV_POPULATE_READ
  constexpr int kPopulate = MADV_POPULATE_READ;
#else
  constexpr int kPopulate = 22;  // headers older than the kernel
#endif
  check(offset <= bytes_.size() && count <= bytes_.size() - offset, path_, ": has no bytes ", offset, " to ", offset + count);
  const uint64_t page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE)), first = offset / page * page;
  void* at = const_cast<uint8_t*>(bytes_.data()) + first;
  while (::madvise(at, offset + count - first, kPopulate) != 0) {
    if (errno == EINTR || errno == EAGAIN) continue;
    check(errno == EINVAL, path_, ": cannot be read: ", errno == EFAULT ? "the disk failed, or the file was cut" : std::strerror(errno));
    break;  // the kernel does not know the request
  }
}

void allow_open_files(int64_t count) {
  constexpr int64_t kOthers = 256;
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= static_cast<rlim_t>(count + kOthers)) return;
  limit.rlim_cur = std::min(limit.rlim_max, static_cast<rlim_t>(count + kOthers));
  ::setrlimit(RLIMIT_NOFILE, &limit);
}

}  // namespace mesa
