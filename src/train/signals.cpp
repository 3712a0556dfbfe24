#include "mesa/train/signals.h"

#include <csignal>
#include <unistd.h>

namespace mesa {
namespace {

volatile std::sig_atomic_t received_signal = 0;
struct sigaction previous_term, previous_int;

void on_signal(int number) {
  if (received_signal != 0) _exit(128 + number);
  received_signal = number;  // only a flag: saving from a handler would not be safe
}

}  // namespace

SignalGuard::SignalGuard() {
  received_signal = 0;
  struct sigaction action {};
  action.sa_handler = on_signal;
  sigemptyset(&action.sa_mask);
  action.sa_flags = SA_RESTART;
  sigaction(SIGTERM, &action, &previous_term);
  sigaction(SIGINT, &action, &previous_int);
}

SignalGuard::~SignalGuard() {
  sigaction(SIGTERM, &previous_term, nullptr);
  sigaction(SIGINT, &previous_int, nullptr);
}

int SignalGuard::received() { return received_signal; }

}  // namespace mesa
