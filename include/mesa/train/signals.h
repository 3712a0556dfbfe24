// SIGTERM and SIGINT ask a run to finish its step and save; a second one ends it at once.
#pragma once

namespace mesa {

/// Exit code of a run that was stopped by a signal and can be resumed (EX_TEMPFAIL).
inline constexpr int kExitResumable = 75;

/// RAII: handles the signals while it lives.
class SignalGuard {
 public:
  SignalGuard();
  ~SignalGuard();
  SignalGuard(const SignalGuard&) = delete;
  SignalGuard& operator=(const SignalGuard&) = delete;
  /// The signal that arrived, or 0.
  static int received();
};

}  // namespace mesa
