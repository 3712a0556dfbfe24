// Files that survive crashes and full disks: checked appends, atomic replacement, and folders with a verified manifest.
#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>

#include "mesa/base/error.h"

namespace mesa {

/// A file being written. Every failure (full disk, I/O error, not writable) throws mesa::Error with the path and the system's reason.
class OutputFile {
 public:
  enum class Mode { truncate, append };
  explicit OutputFile(const std::string& path, Mode mode = Mode::truncate);
  /// Writes what is buffered but cannot report a failure: call close() or flush() where it matters.
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  void write(std::string_view text);  ///< buffered
  void flush();                       ///< hands everything to the system
  void sync();                        ///< and waits until it is on the disk
  void close();                       ///< flushes; further writes are errors
  const std::string& path() const { return path_; }

 private:
  void write_out(std::string_view bytes);
  std::string path_, buffer_;
  int fd_ = -1;
};

/// mkdir -p with mesa::Error.
void make_folders(const std::string& path);

/// Throws Error if a result could not be written there later.
void check_can_write(const std::string& path);
/// Replaces a file in one step: readers see the old content or the new, also after a crash. A symbolic link stays one; pipes and devices
/// are written to as they are.
void write_file_atomically(const std::string& path, std::string_view content);
/// The same for content that comes piece by piece; an error of `write` leaves the old content and goes on to the caller.
void write_file_atomically(const std::string& path, const std::function<void(OutputFile& out)>& write);

/// Replaces a folder in one step. `write_files` fills a temporary folder beside `path` (plain files only); each file is synced,
/// `manifest.json` (bytes and CRC-32 of each file) is written last, then the folder takes its name. On an error the temporary folder is
/// removed, the previous folder stays and the error goes on to the caller. After a crash at any moment the previous or the new folder
/// is found by recover_folder(path). The folder that was there before is removed, or goes on under the path `former` in the same parent,
/// which must be free: a crash may then leave it there with nothing at `path`.
void write_folder_atomically(const std::string& path, const std::function<void(const std::string& folder)>& write_files,
                             const std::string& former = "");

/// Finishes what a crash interrupted: puts back a folder that had been moved aside and removes leftovers. True if `path` is a folder now.
bool recover_folder(const std::string& path);

/// Removes a folder: first it loses its name (to `path`.tmp), so that a crash leaves nothing that looks like one.
void remove_folder(const std::string& path);

/// Checks every file of a folder against its manifest. Throws mesa::Error that names the file and what differs.
void verify_folder(const std::string& path);

/// For fault tests: asked before each operation ("open", "write", "sync", "mkdir", "rename", "exchange", "remove") on a path; a value other
/// than 0 is the errno with which the operation then fails, kShortWrite lets a write take half of what it was given. Asked by every thread
/// that writes, perhaps at once; an empty function removes it.
using FileFault = std::function<int(std::string_view operation, const std::string& path)>;
inline constexpr int kShortWrite = -1;
void set_file_fault(FileFault fault);

}  // namespace mesa
