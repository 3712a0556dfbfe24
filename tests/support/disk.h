// What a power failure leaves of a folder, as far as POSIX promises anything: what was synced.
#pragma once
#include <sys/types.h>

#include <map>
#include <string>
#include <string_view>

namespace mesa::testing {

/// Watches the operations that the hook of set_file_fault() is asked about. A file's bytes are on the disk once the file was synced, and a
/// name (made, given or taken away) once the folder that holds it was, a removed folder's names included. Plain files and folders only.
class Disk {
 public:
  /// Everything in `root` lies on the disk already.
  explicit Disk(std::string root);
  ~Disk();
  Disk(const Disk&) = delete;
  Disk& operator=(const Disk&) = delete;

  void note(std::string_view operation, const std::string& path);

  /// Which of the names that were not synced are lost; the others had come to the disk by chance.
  struct Loss {
    bool outer = true;  ///< those in `root` itself
    bool inner = true;  ///< those further down
  };
  /// Power failure: `root` is left as it is found after the next start. Of a file's bytes that were not synced, the first half is there.
  void lose(Loss loss);

 private:
  using Node = ino_t;
  struct Entry {
    int fd = -1;  // open, so that the number is not given to another file
    bool folder = false, synced = false;
    std::map<std::string, Node> names;  // of a folder, when it was last synced
    std::string bytes;                  // of a file, likewise
  };

  Node take(const std::string& path);
  std::map<std::string, Node> names_in(const std::string& folder);
  std::string bytes_of(const Entry& file) const;
  void restore(Node node, const std::string& path, bool names_lost, bool inner_lost,
               const std::map<Node, std::map<std::string, Node>>& now) const;

  std::string root_;
  std::map<Node, Entry> entries_;
};

}  // namespace mesa::testing
