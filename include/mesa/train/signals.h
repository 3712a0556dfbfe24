// SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask a run to finish its step and save; a second one ends it at once.
#pragma once

namespace mesa {

/// Exit code of a run that was stopped by a signal and can be resumed (EX_TEMPFAIL).
inline constexpr int kExitResumable = 75;

/// Handles the signals from now on until the process ends: one that comes after the last step must not kill a finished run. SIGPIPE is
/// ignored, since a reader of the progress that goes away must not end the training, and SIGXFSZ too: a limit on the size of files is met
/// like a full disk. SIGHUP stays ignored where it was (nohup). Two signals within a fifth of a second count as one: `timeout` and mpirun
/// send them twice.
void handle_signals();
/// The signal that arrived, or 0.
int received_signal();

}  // namespace mesa
