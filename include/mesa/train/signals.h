// Signals that ask a run to finish its step and save; a second one ends it at once.
#pragma once
#include <string>
#include <vector>

#include "mesa/base/error.h"

namespace mesa {

/// Exit code of a run that was stopped by a signal and can be resumed (EX_TEMPFAIL).
inline constexpr int kExitResumable = 75;

/// Handles the signals of these names ("SIGTERM"; those that train.stop_signals may hold) from now on until the process ends: one that
/// comes after the last step must not kill a finished run. SIGPIPE is ignored, since a reader of the progress that goes away must not end
/// the training, and SIGXFSZ too: a limit on the size of files is met like a full disk. SIGHUP stays ignored where it was (nohup). Two
/// signals within a fifth of a second count as one: `timeout` and mpirun send them twice.
void handle_signals(const std::vector<std::string>& names);
/// The signal that arrived, or 0.
int received_signal();

/// Work that a signal ended early and that leaves nothing to resume.
class Stopped : public Error {
 public:
  using Error::Error;
};
/// Throws Stopped after a signal.
void stop_if_asked();

}  // namespace mesa
