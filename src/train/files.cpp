#include "mesa/train/files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

#include "mesa/base/files.h"

namespace mesa {
namespace fs = std::filesystem;
namespace {

constexpr size_t kBufferBytes = 1 << 16;
constexpr int kManifestFormat = 1;
constexpr const char* kManifest = "manifest.json";
constexpr int64_t kMaxManifestBytes = 1 << 24;

// Several threads ask; a shared pointer keeps a hook that is taken away while it is asked.
std::atomic<std::shared_ptr<const FileFault>>& fault() {
  static std::atomic<std::shared_ptr<const FileFault>> hook;
  return hook;
}

// 0, or the errno of an injected fault.
int injected(std::string_view operation, const std::string& path) {
  const std::shared_ptr<const FileFault> hook = fault().load();
  return hook ? (*hook)(operation, path) : 0;
}

[[noreturn]] void io_error(const char* what, const std::string& path, int code) {
  throw Error(concat("cannot ", what, " ", path, ": ", std::strerror(code)));
}

struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

// Files that have no disk behind them (pipes, /dev/null) cannot be synced, and need not be.
void sync_descriptor(int fd, const std::string& path) {
  int code = injected("sync", path);
  if (code == 0 && ::fsync(fd) != 0) code = errno;
  if (code != 0 && code != EINVAL && code != EROFS) io_error("sync", path, code);
}

void sync_path(const std::string& path) {
  Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  if (file.fd < 0) io_error("open", path, errno);
  sync_descriptor(file.fd, path);
}

/// Without an error: what is synced later fails where this disk does.
void sync_quietly(const std::string& path) {
  const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  if (file.fd >= 0 && injected("sync", path) == 0) ::fsync(file.fd);
}

std::string parent_of(const std::string& path) {
  const std::string parent = fs::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

// "runs/a/" and "runs/a" are one folder; the neighbours' names hang on it.
std::string without_slash(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path;
}

void rename_path(const std::string& from, const std::string& to) {
  int code = injected("rename", to);
  if (code == 0 && ::rename(from.c_str(), to.c_str()) != 0) code = errno;
  if (code != 0) io_error("rename to", to, code);
}

// Swaps two paths in one step; false where the file system cannot.
bool exchange_paths(const std::string& a, const std::string& b) {
  int code = injected("exchange", b);
  if (code == 0 && ::renameat2(AT_FDCWD, a.c_str(), AT_FDCWD, b.c_str(), RENAME_EXCHANGE) != 0) code = errno;
  if (code == EINVAL || code == ENOSYS || code == ENOTSUP) return false;
  if (code != 0) io_error("rename to", b, code);
  return true;
}

void remove_tree(const std::string& path) {
  std::error_code error;
  if (const int code = injected("remove", path)) io_error("remove", path, code);
  fs::remove_all(path, error);
  if (error) io_error("remove", path, error.value());
}

bool is_folder(const std::string& path) {
  std::error_code ignored;
  return fs::is_directory(path, ignored);
}

bool exists(const std::string& path) {
  std::error_code ignored;
  return fs::exists(fs::symlink_status(path, ignored));
}

struct Sum {
  int64_t bytes = 0;
  std::string crc32;
};

Sum sum_file(const std::string& path) {
  Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  if (file.fd < 0) io_error("open", path, errno);
  std::vector<unsigned char> block(1 << 20);
  uLong crc = crc32_z(0, nullptr, 0);
  Sum sum;
  for (;;) {
    const ssize_t got = ::read(file.fd, block.data(), block.size());
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) io_error("read", path, errno);
    if (got == 0) break;
    crc = crc32_z(crc, block.data(), static_cast<size_t>(got));
    sum.bytes += got;
  }
  char text[16];
  std::snprintf(text, sizeof text, "%08lx", static_cast<unsigned long>(crc));
  sum.crc32 = text;
  return sum;
}

// One text for one manifest: a flipped bit anywhere in it is seen by writing it again.
std::string manifest_text(const nlohmann::json& manifest) { return manifest.dump(1) + "\n"; }

void write_manifest(const std::string& folder) {
  nlohmann::json files = nlohmann::json::object();
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string path = entry.path().string();
    check(entry.is_regular_file() && !entry.is_symlink(), path, " is not a plain file");
    sync_path(path);
    const Sum sum = sum_file(path);
    files[entry.path().filename().string()] = {{"bytes", sum.bytes}, {"crc32", sum.crc32}};
  }
  const nlohmann::json manifest = {{"format", kManifestFormat}, {"files", files}};
  OutputFile out(folder + "/" + kManifest);
  out.write(manifest_text(manifest));
  out.sync();
  out.close();
  sync_path(folder);
}

nlohmann::json read_manifest(const std::string& folder) {
  const std::string path = folder + "/" + kManifest;
  if (!is_folder(folder)) throw Error(concat(folder, (exists(folder) ? " is not a folder" : " does not exist")));
  if (!exists(path)) throw Error(concat(path, " is missing: not a checkpoint, or one whose writing was interrupted"));
  const std::string text = read_text(path, kMaxManifestBytes);
  const nlohmann::json manifest = nlohmann::json::parse(text, nullptr, false);
  const bool readable = manifest.is_object() && manifest.contains("format") && manifest["format"].is_number_integer();
  if (readable && manifest["format"] > kManifestFormat && manifest["format"] < 1000)
    throw Error(concat(path, " has format ", manifest["format"].dump(), ", but this version of Mesa reads up to ", kManifestFormat));
  bool whole = readable && manifest["format"] == kManifestFormat && manifest.size() == 2 && manifest.contains("files") &&
               manifest["files"].is_object() && manifest_text(manifest) == text;
  if (whole)
    for (const auto& [name, file] : manifest["files"].items())
      whole = whole && !name.empty() && name.find('/') == std::string::npos && name != "." && name != ".." && file.is_object() &&
              file.contains("bytes") && file["bytes"].is_number_integer() && file.contains("crc32") && file["crc32"].is_string();
  if (!whole) throw Error(concat(path, " is damaged"));
  return manifest;
}

void remove_quietly(const std::string& path) {
  std::error_code ignored;
  fs::remove_all(path, ignored);
}

// After the new folder is in place a leftover harms nothing: the next write clears it, so no error here.
void remove_leftover(const std::string& path) {
  if (injected("remove", path) == 0) remove_quietly(path);
}

// The folder that was there before goes, or (`former`) goes on under that name: then it gets it first, so that no crash loses either.
void put_in_place(const std::string& temporary, const std::string& path, const std::string& former) {
  if (!exists(path)) {
    rename_path(temporary, path);
    return sync_path(parent_of(path));
  }
  if (former.empty() && exchange_paths(temporary, path)) {
    sync_path(parent_of(path));  // where this fails the previous folder stays until the next write: which is on the disk, nobody knows
    return remove_leftover(temporary);  // now the previous folder
  }
  const std::string aside = former.empty() ? path + ".old" : former;
  if (former.empty()) remove_tree(aside);
  rename_path(path, aside);
  try {
    rename_path(temporary, path);
  } catch (const Error&) {
    ::rename(aside.c_str(), path.c_str());
    throw;
  }
  sync_path(parent_of(path));
  if (former.empty()) remove_leftover(aside);
}

}  // namespace

void set_file_fault(FileFault hook) { fault() = hook ? std::make_shared<const FileFault>(std::move(hook)) : nullptr; }

OutputFile::OutputFile(const std::string& path, Mode mode) : path_(path) {
  int code = injected("open", path);
  if (code == 0) {
    fd_ = ::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | (mode == Mode::append ? O_APPEND : O_TRUNC), 0666);
    if (fd_ < 0) code = errno;
  }
  if (code != 0) io_error("open", path, code);
}

OutputFile::~OutputFile() {
  if (fd_ < 0) return;
  try {
    flush();
  } catch (const Error&) {  // a destructor has nobody to tell
  }
  if (fd_ >= 0) ::close(fd_);
}

void OutputFile::write_out(std::string_view bytes) {
  while (!bytes.empty()) {
    const int code = injected("write", path_);
    if (code > 0) io_error("write", path_, code);
    const size_t most = code == kShortWrite ? (bytes.size() + 1) / 2 : size_t{1} << 30;
    const ssize_t done = ::write(fd_, bytes.data(), std::min(bytes.size(), most));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) io_error("write", path_, errno);
    bytes.remove_prefix(static_cast<size_t>(done));
  }
}

void OutputFile::write(std::string_view text) {
  check(fd_ >= 0, path_, " is closed");
  if (buffer_.size() + text.size() > kBufferBytes) flush();
  if (text.size() > kBufferBytes)
    write_out(text);
  else
    buffer_ += text;
}

void OutputFile::flush() {
  if (fd_ < 0) return;
  std::string pending;
  pending.swap(buffer_);  // a failed write is reported once, not again by the destructor
  write_out(pending);
}

void OutputFile::sync() {
  flush();
  sync_descriptor(fd_, path_);
}

void OutputFile::close() {
  flush();
  const int fd = std::exchange(fd_, -1);
  if (fd >= 0 && ::close(fd) != 0) io_error("close", path_, errno);  // network file systems tell of a full disk here
}

void make_folders(const std::string& path) {
  std::error_code error;
  if (const int code = injected("mkdir", path)) io_error("make the folder", path, code);
  std::string made = without_slash(path);
  std::vector<std::string> parents;  // of what is not there yet: a new name must reach the disk, too
  for (; !exists(made) && !made.empty(); made = parent_of(made)) parents.push_back(parent_of(made));
  fs::create_directories(path, error);
  for (const std::string& parent : parents) sync_quietly(parent);
  if (error) io_error("make the folder", path, error.value());
  check(is_folder(path), path, " exists and is not a folder");
}

/// A pipe, a terminal, /dev/stdout: what can only be written to, not replaced.
bool is_special(const std::string& path) {
  std::error_code ignored;
  const fs::file_status status = fs::status(path, ignored);
  return (fs::exists(status) && !fs::is_regular_file(status) && !fs::is_directory(status)) || path.starts_with("/dev/") ||
         path.starts_with("/proc/");
}

void check_can_write(const std::string& path) {
  check(!is_folder(path), path, " is a folder");
  if (is_special(path)) return;
  const std::string trial = path + ".tmp";
  OutputFile(trial).close();
  ::unlink(trial.c_str());
}

void write_file_atomically(const std::string& path, std::string_view content) {
  write_file_atomically(path, [&](OutputFile& out) { out.write(content); });
}

void write_file_atomically(const std::string& given, const std::function<void(OutputFile&)>& write) {
  if (is_special(given)) {
    OutputFile out(given);
    write(out);
    out.close();
    return;
  }
  // What a link points to is replaced, not the link.
  const std::string path = fs::is_symlink(given) ? (fs::path(given).parent_path() / fs::read_symlink(given)).string() : given;
  const std::string temporary = path + ".tmp";
  try {
    OutputFile out(temporary);
    write(out);
    out.sync();
    out.close();
    rename_path(temporary, path);
  } catch (...) {
    ::unlink(temporary.c_str());
    throw;
  }
  sync_path(parent_of(path));
}

bool recover_folder(const std::string& given) {
  const std::string path = without_slash(given);
  if (!exists(path) && is_folder(path + ".old")) rename_path(path + ".old", path);
  if (exists(path + ".old")) remove_tree(path + ".old");
  if (exists(path + ".tmp")) remove_tree(path + ".tmp");
  return is_folder(path);
}

void write_folder_atomically(const std::string& given, const std::function<void(const std::string&)>& write_files,
                             const std::string& former) {
  const std::string path = without_slash(given), temporary = path + ".tmp";
  check(!exists(path) || is_folder(path), path, " exists and is not a folder");
  make_folders(parent_of(path));
  recover_folder(path);
  try {
    make_folders(temporary);
    write_files(temporary);
    write_manifest(temporary);
  } catch (const fs::filesystem_error& e) {
    remove_quietly(temporary);
    throw Error(concat("cannot write ", path, ": ", e.code().message()));
  } catch (...) {
    remove_quietly(temporary);
    throw;
  }
  put_in_place(temporary, path, former);
}

void remove_folder(const std::string& given) {
  const std::string path = without_slash(given), nameless = path + ".tmp";
  if (exists(nameless)) remove_tree(nameless);
  rename_path(path, nameless);
  sync_path(parent_of(path));  // else a power failure may bring the name back, and not what was in it
  remove_tree(nameless);
}

void verify_folder(const std::string& given) {
  const std::string folder = without_slash(given);
  const nlohmann::json manifest = read_manifest(folder);
  for (const auto& [name, expected] : manifest["files"].items()) {
    const std::string path = folder + "/" + name;
    if (!exists(path)) throw Error(concat(path, " is missing"));
    const Sum found = sum_file(path);
    const auto bytes = expected["bytes"].get<int64_t>();
    if (found.bytes != bytes)
      throw Error(concat(path, found.bytes < bytes ? " is truncated: " : " has grown: ", found.bytes, " bytes instead of ", bytes));
    if (found.crc32 != expected["crc32"].get<std::string>())
      throw Error(concat(path, " is damaged: its checksum is ", found.crc32, " instead of ", expected["crc32"].get<std::string>()));
  }
}

}  // namespace mesa
