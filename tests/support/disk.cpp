#include "support/disk.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "mesa/base/error.h"

namespace mesa::testing {
namespace fs = std::filesystem;

Disk::Disk(std::string root) : root_(std::move(root)) {
  const auto sync = [this](const std::string& path) { note("sync", path); };
  sync(root_);
  for (const auto& entry : fs::recursive_directory_iterator(root_)) sync(entry.path().string());
}

Disk::~Disk() {
  for (const auto& [node, entry] : entries_) ::close(entry.fd);
}

/// The node at a path, known from now on.
Disk::Node Disk::take(const std::string& path) {
  struct stat status {};
  check(::stat(path.c_str(), &status) == 0, "cannot look at ", path);
  auto [found, fresh] = entries_.try_emplace(status.st_ino);
  if (fresh) {
    found->second.fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    found->second.folder = S_ISDIR(status.st_mode);
    check(found->second.fd >= 0, "cannot open ", path);
  }
  return status.st_ino;
}

std::map<std::string, Disk::Node> Disk::names_in(const std::string& folder) {
  std::map<std::string, Node> names;
  for (const auto& entry : fs::directory_iterator(folder)) names[entry.path().filename().string()] = take(entry.path().string());
  return names;
}

std::string Disk::bytes_of(const Entry& file) const {
  struct stat status {};
  check(::fstat(file.fd, &status) == 0, "cannot look at a file of ", root_);
  std::string bytes(static_cast<size_t>(status.st_size), '\0');
  check(::pread(file.fd, bytes.data(), bytes.size(), 0) == status.st_size, "cannot read a file of ", root_);
  return bytes;
}

void Disk::note(std::string_view operation, const std::string& path) {
  if (operation != "sync" || (path != root_ && !path.starts_with(root_ + "/"))) return;
  Entry& entry = entries_.at(take(path));
  entry.synced = true;
  if (entry.folder)
    entry.names = names_in(path);
  else
    entry.bytes = bytes_of(entry);
}

void Disk::restore(Node node, const std::string& path, bool names_lost, bool inner_lost,
                   const std::map<Node, std::map<std::string, Node>>& now) const {
  const Entry& entry = entries_.at(node);
  if (!entry.folder) {
    const std::string bytes = entry.synced ? entry.bytes : bytes_of(entry);
    std::ofstream(path, std::ios::binary) << bytes.substr(0, entry.synced ? bytes.size() : bytes.size() / 2);
    return;
  }
  fs::create_directory(path);
  const auto present = now.find(node);  // nothing is in a folder that was removed
  static const std::map<std::string, Node> kNothing;
  const auto& names = names_lost ? entry.names : present == now.end() ? kNothing : present->second;
  for (const auto& [name, inner] : names) restore(inner, path + "/" + name, inner_lost, inner_lost, now);
}

void Disk::lose(Loss loss) {
  std::map<Node, std::map<std::string, Node>> now;
  now[take(root_)] = names_in(root_);
  for (const auto& entry : fs::recursive_directory_iterator(root_))
    if (entry.is_directory()) now[take(entry.path().string())] = names_in(entry.path().string());
  const std::string left = root_ + ".after";
  fs::remove_all(left);
  restore(take(root_), left, loss.outer, loss.inner, now);
  fs::remove_all(root_);
  fs::rename(left, root_);
}

}  // namespace mesa::testing
