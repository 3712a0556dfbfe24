#include "mesa/base/threads.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace mesa {

void parallel_for(int64_t n, int64_t threads, const std::function<void(int64_t)>& f) {
  if (threads <= 0) threads = std::max<int64_t>(1, std::thread::hardware_concurrency());
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;
  int64_t failed = n;  // the lowest number that did
  const auto work = [&] {
    for (int64_t i = next++; i < n; i = next++) try {
        f(i);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (i < failed) error = std::current_exception();
        failed = std::min(failed, i);
        next = n;
      }
  };
  std::vector<std::thread> helpers;
  {
    const SignalsBlocked blocked;
    try {
      for (int64_t i = 1; i < std::min(threads, n); ++i) helpers.emplace_back(work);
    } catch (const std::system_error&) {  // with fewer threads it takes longer
    }
  }
  work();
  for (auto& helper : helpers) helper.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace mesa
