// SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask a run to finish its step and save; a second one ends it at once.
#pragma once

namespace mesa {

/// Exit code of a run that was stopped by a signal and can be resumed (EX_TEMPFAIL).
inline constexpr int kExitResumable = 75;

/// RAII: handles the signals while it lives, and ignores SIGPIPE: a reader of the progress that goes away must not end the training.
/// SIGXFSZ too: a limit on the size of files is met like a full disk.
/// SIGHUP stays ignored where it was (nohup). Two signals within a fifth of a second count as one: `timeout` and mpirun send them twice.
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
