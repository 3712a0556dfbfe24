#include "item_progress.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "mesa/train/metrics.h"

namespace mesa {

namespace {
/// A reader that went away stops nothing.
void put(int fd, const std::string& text) {
  for (size_t done = 0; done < text.size();) {
    const ssize_t n = ::write(fd, text.data() + done, text.size() - done);
    if (n <= 0) return;
    done += static_cast<size_t>(n);
  }
}
constexpr const char* kClear = "\r\x1b[K";
}  // namespace

ItemProgress::ItemProgress(std::string what, int64_t total, int fd)
    : what_(std::move(what)), total_(std::max<int64_t>(total, 1)), fd_(fd), terminal_(isatty(fd) == 1) {}

ItemProgress::~ItemProgress() {
  if (terminal_) put(fd_, kClear);
}

std::string ItemProgress::text() const {
  const double share = static_cast<double>(done_) / static_cast<double>(total_);
  const double seconds = std::chrono::duration<double>(Clock::now() - start_).count();
  char numbers[128];
  std::snprintf(numbers, sizeof numbers, "%3.0f%%  %lld/%lld images  %.0f img/s  ETA ", 100 * share, static_cast<long long>(done_),
                static_cast<long long>(total_), seconds > 0 ? static_cast<double>(done_) / seconds : 0);
  const std::string rest = numbers + format_duration(share > 0 ? seconds * (1 - share) / share : -1);
  const int room = terminal_ ? terminal_width(fd_) - static_cast<int>(what_.size() + rest.size()) - 7 : 0;
  return what_ + "  " + (room >= 6 ? format_bar(share, std::min(room, 30)) + "  " : "") + rest;
}

void ItemProgress::advance(int64_t items) {
  const int64_t tenth = 10 * done_ / total_;
  done_ += items;
  if (!terminal_) {
    if (10 * done_ / total_ != tenth) put(fd_, text() + "\n");
    return;
  }
  const auto now = Clock::now();
  if (now - drawn_ < std::chrono::milliseconds(100)) return;
  drawn_ = now;
  put(fd_, kClear + text());
}

void ItemProgress::print(const std::string& line, int fd) const {
  if (terminal_) put(fd_, kClear);
  put(fd, line + "\n");
  if (terminal_) put(fd_, text());
}

}  // namespace mesa
