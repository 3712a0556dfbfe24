#include "mesa/train/signals.h"

#include <csignal>
#include <ctime>
#include <unistd.h>

namespace mesa {
namespace {

constexpr int kSignals[] = {SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGPIPE, SIGXFSZ};
constexpr int kCount = sizeof kSignals / sizeof *kSignals;
constexpr double kSameSignal = 0.2;  // seconds

volatile std::sig_atomic_t received_signal = 0;
volatile double received_at = 0;
struct sigaction previous[kCount];

double seconds() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);  // one of the few calls that a handler may make
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

void on_signal(int number) {
  if (received_signal != 0) {
    if (seconds() - received_at > kSameSignal) _exit(128 + number);
    return;
  }
  received_at = seconds();
  received_signal = number;  // only a flag: saving from a handler would not be safe
}

}  // namespace

SignalGuard::SignalGuard() {
  received_signal = 0;
  struct sigaction action {};
  sigemptyset(&action.sa_mask);
  action.sa_flags = SA_RESTART;
  for (int i = 0; i < kCount; ++i) {
    action.sa_handler = kSignals[i] == SIGPIPE || kSignals[i] == SIGXFSZ ? SIG_IGN : on_signal;
    sigaction(kSignals[i], nullptr, &previous[i]);
    const bool nohup = kSignals[i] == SIGHUP && previous[i].sa_handler == SIG_IGN;
    if (!nohup) sigaction(kSignals[i], &action, nullptr);
  }
}

SignalGuard::~SignalGuard() {
  for (int i = 0; i < kCount; ++i) sigaction(kSignals[i], &previous[i], nullptr);
}

int SignalGuard::received() { return received_signal; }

}  // namespace mesa
