// Who trains in a folder: one run at a time.
#pragma once
#include <string>

namespace mesa {

/// Creates the first of `name`, `name`-2, `name`-3, .. that is not there yet, with its parents, and returns it. Throws Error.
std::string claim_folder(const std::string& name);

/// Keeps other runs out of a folder, which it creates, for as long as it lives; whatever ends the process opens it again. The file run.lock
/// stays behind and says which process was the last one. On file systems without locks nobody is kept out.
class FolderLock {
 public:
  /// Throws Error if another run has the folder, or if it cannot be written.
  explicit FolderLock(const std::string& folder);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  int fd_;
};

}  // namespace mesa
