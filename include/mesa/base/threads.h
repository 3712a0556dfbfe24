// What helper threads have in common.
#pragma once
#include <csignal>
#include <cstdint>
#include <functional>

namespace mesa {

/// Threads that are started while this lives get no signal that ends a program: the main thread handles those between steps.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP}) sigdelset(&all, fault);
    pthread_sigmask(SIG_BLOCK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

/// Calls f(0), ..., f(n - 1) on up to `threads` threads (0: one for each processor) and waits for them. Once a call has failed no more are
/// begun, and the error of the lowest number is thrown.
void parallel_for(int64_t n, int64_t threads, const std::function<void(int64_t)>& f);

}  // namespace mesa
