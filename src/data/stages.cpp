#include "mesa/data/stages.h"

namespace mesa {

namespace {
using Clock = std::chrono::steady_clock;

struct Stopwatch {
  Stage stage = Stage::other;
  Clock::time_point since;
  StageTimes times;

  /// Charges the time since the last change to the stage that ends.
  void change_to(Stage next) {
    const Clock::time_point now = Clock::now();
    const double seconds = std::chrono::duration<double>(now - since).count();
    if (stage == Stage::read) times.read += seconds;
    if (stage == Stage::decode) times.decode += seconds;
    if (stage == Stage::augment) times.augment += seconds;
    stage = next;
    since = now;
  }
};

Stopwatch& stopwatch() {
  thread_local Stopwatch watch;
  return watch;
}
}  // namespace

const StageTimes& stage_times() { return stopwatch().times; }

StageScope::StageScope(Stage stage) : outer_(stopwatch().stage) { stopwatch().change_to(stage); }
StageScope::~StageScope() { stopwatch().change_to(outer_); }

}  // namespace mesa
