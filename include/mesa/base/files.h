// Reading files of outside data: whole, at any place, or mapped into memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace mesa {

/// All bytes of a regular file; the error says whether it is missing, not a file, unreadable or larger than `limit` bytes, which is found
/// out before memory is taken.
std::vector<uint8_t> read_bytes(const std::string& path, int64_t limit = int64_t{1} << 34);
/// The same as text.
std::string read_text(const std::string& path, int64_t limit = int64_t{1} << 34);

/// A regular file that several threads read at any place.
class InputFile {
 public:
  /// Throws Error naming the path where it is missing, unreadable or no regular file.
  explicit InputFile(const std::string& path);
  ~InputFile();
  InputFile(InputFile&& other) noexcept;
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;
  const std::string& path() const { return path_; }
  uint64_t size() const { return size_; }  ///< bytes, when it was opened
  /// Exactly `count` bytes from `offset` on. Throws Error where the disk fails or the file has become shorter.
  void read(uint64_t offset, uint8_t* to, size_t count) const;

 private:
  std::string path_;
  int fd_;
  uint64_t size_ = 0;
};

/// A regular file in memory, read-only: all processes that map it share its pages.
class MappedFile {
 public:
  /// Throws Error as InputFile does, and for an empty file.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  const std::string& path() const { return path_; }
  std::span<const uint8_t> bytes() const { return bytes_; }
  /// Brings a part into memory in one go. Throws Error where the disk fails or the file was cut, which a plain access would answer with a
  /// signal (on Linux before 5.14 it still does).
  void fetch(uint64_t offset, uint64_t count) const;

 private:
  std::string path_;
  std::span<const uint8_t> bytes_;
};

/// Lets this process keep `count` more files open, as far as the system's hard limit goes.
void allow_open_files(int64_t count);

}  // namespace mesa
