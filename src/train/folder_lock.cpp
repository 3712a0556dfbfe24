#include "folder_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "mesa/base/error.h"
#include "mesa/train/files.h"

namespace mesa {
namespace {

std::string this_process() {
  std::array<char, 256> host{};
  ::gethostname(host.data(), host.size() - 1);
  return concat("process ", ::getpid(), " on ", host.data());
}

/// Who wrote its name into the lock's file.
std::string holder(int fd) {
  std::array<char, 300> text{};
  const ssize_t n = ::pread(fd, text.data(), text.size() - 1, 0);
  const std::string name(text.data(), n > 0 ? static_cast<size_t>(n) : 0);
  return name.empty() ? "another process" : name.substr(0, name.find('\n'));
}

/// For people: if it cannot be written, the lock holds nevertheless.
void write_name(int fd) {
  const std::string name = this_process() + "\n";
  if (::ftruncate(fd, 0) == 0 && ::pwrite(fd, name.data(), name.size(), 0) < 0) return;
}

}  // namespace

std::string claim_folder(const std::string& name) {
  const std::string parent = std::filesystem::path(name).parent_path().string();
  if (!parent.empty()) make_folders(parent);
  for (int n = 1;; ++n) {
    const std::string folder = n == 1 ? name : concat(name, "-", n);
    if (::mkdir(folder.c_str(), 0777) == 0) return folder;
    if (errno != EEXIST) throw Error(concat("cannot create the folder ", folder, ": ", std::strerror(errno)));
  }
}

FolderLock::FolderLock(const std::string& folder) {
  make_folders(folder);
  const std::string file = folder + "/run.lock";
  fd_ = ::open(file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (fd_ < 0) throw Error(concat("cannot write to ", file, ": ", std::strerror(errno)));
  const bool ours = ::flock(fd_, LOCK_EX | LOCK_NB) == 0;
  if (ours || errno != EWOULDBLOCK) {
    write_name(fd_);
    return;
  }
  const std::string who = holder(fd_);
  ::close(fd_);
  throw Error(concat("a run is going on in ", folder, " (", who, "); wait for its end or stop it, or choose another folder with --output"));
}

FolderLock::~FolderLock() { ::close(fd_); }

}  // namespace mesa
