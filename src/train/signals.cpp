#include "mesa/train/signals.h"

#include <unistd.h>

#include <csignal>
#include <ctime>

namespace mesa {
namespace {

constexpr int kSignals[] = {SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGPIPE, SIGXFSZ};
constexpr double kSameSignal = 0.2;  // seconds

volatile std::sig_atomic_t received = 0;
volatile double received_at = 0;

double seconds() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);  // one of the few calls that a handler may make
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

void on_signal(int number) {
  if (received != 0) {
    if (seconds() - received_at > kSameSignal) _exit(128 + number);
    return;
  }
  received_at = seconds();
  received = number;  // only a flag: saving from a handler would not be safe
}

}  // namespace

void handle_signals() {
  struct sigaction action {};
  sigemptyset(&action.sa_mask);
  action.sa_flags = SA_RESTART;
  for (const int number : kSignals) {
    action.sa_handler = number == SIGPIPE || number == SIGXFSZ ? SIG_IGN : on_signal;
    struct sigaction before {};
    sigaction(number, nullptr, &before);
    const bool nohup = number == SIGHUP && before.sa_handler == SIG_IGN;
    if (!nohup) sigaction(number, &action, nullptr);
  }
}

int received_signal() { return received; }

}  // namespace mesa
