// How long each kernel of a GPU takes among the others: named work on the stream, timed by events. Weak symbols as in cuda.h.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace mesa::cuda {

/// All that ran under one name. A call is timed from the event before it to the one behind it: some microseconds more than it takes, where
/// the GPU waits for the host.
struct ProfileRow {
  std::string name;
  int64_t calls = 0;
  double ms = 0;  ///< of all calls
};

/// From here on work that is handed to stream() by name is timed; for one thread.
[[gnu::weak]] void start_profile();
/// Waits for the GPU; the rows with the most time first.
[[gnu::weak]] std::vector<ProfileRow> end_profile();
/// Ends it where nobody will ask for the rows.
[[gnu::weak]] void stop_profile();
/// True in between, unless work is recorded, which has no time of its own.
[[gnu::weak]] bool profiling();

/// Seconds from an event before what `f` hands to stream() to one behind it, on a GPU that has nothing else to do: what the GPU takes or,
/// if that is longer, the host. Waits for the GPU before and after. `ahead` hands over work that is not timed: while it runs the host gets
/// ahead.
[[gnu::weak]] double seconds_of(const std::function<void()>& f, const std::function<void()>& ahead = {});

namespace detail {
[[gnu::weak]] void begin_timed(std::string_view name);
[[gnu::weak]] void end_timed();
}  // namespace detail

/// What is handed to stream() for as long as this lives, by name.
class Timed {
 public:
  explicit Timed(std::string_view name) : on_(profiling != nullptr && profiling()) {
    if (on_) detail::begin_timed(name);
  }
  ~Timed() {
    if (on_) detail::end_timed();
  }
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;

 private:
  bool on_;
};

}  // namespace mesa::cuda
