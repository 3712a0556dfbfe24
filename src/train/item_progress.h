// The progress of work that counts items.
#pragma once
#include <chrono>
#include <cstdint>
#include <string>

namespace mesa {

/// On a terminal a line with a bar, redrawn in place; elsewhere a plain line for each tenth.
class ItemProgress {
 public:
  /// `what` begins the line ("checking"); fd: where to print.
  ItemProgress(std::string what, int64_t total, int fd = 2);
  /// Takes the line away.
  ~ItemProgress();
  ItemProgress(const ItemProgress&) = delete;
  ItemProgress& operator=(const ItemProgress&) = delete;
  void advance(int64_t items = 1);
  /// Prints a line above the live one.
  void print(const std::string& line, int fd) const;

 private:
  using Clock = std::chrono::steady_clock;
  std::string text() const;
  std::string what_;
  int64_t total_, done_ = 0;
  int fd_;
  bool terminal_;
  Clock::time_point start_ = Clock::now(), drawn_;
};

}  // namespace mesa
