#include "mesa/train/signals.h"

#include <unistd.h>

#include <csignal>
#include <ctime>
#include <map>

namespace mesa {
namespace {

const std::map<std::string, int> kNumbers{{"SIGTERM", SIGTERM}, {"SIGINT", SIGINT},   {"SIGHUP", SIGHUP},   {"SIGUSR1", SIGUSR1},
                                          {"SIGUSR2", SIGUSR2}, {"SIGQUIT", SIGQUIT}, {"SIGALRM", SIGALRM}, {"SIGXCPU", SIGXCPU}};
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

void handle_signals(const std::vector<std::string>& names) {
  struct sigaction stop {
  }, ignore{}, before{};
  sigemptyset(&stop.sa_mask);
  stop.sa_flags = SA_RESTART;
  stop.sa_handler = on_signal;
  ignore.sa_handler = SIG_IGN;
  for (const int number : {SIGPIPE, SIGXFSZ}) sigaction(number, &ignore, nullptr);
  for (const std::string& name : names) {
    const int number = kNumbers.at(name);
    sigaction(number, nullptr, &before);
    const bool nohup = number == SIGHUP && before.sa_handler == SIG_IGN;
    if (!nohup) sigaction(number, &stop, nullptr);
  }
}

int received_signal() { return received; }

void stop_if_asked() {
  if (received != 0) throw Stopped(concat("stopped by signal ", received_signal()));
}

}  // namespace mesa
