// Where the time of a picture goes: how long threads read, decode and augment.
#pragma once
#include <chrono>
#include <cstdint>

namespace mesa {

enum class Stage : uint8_t { other, read, decode, augment };

/// Seconds in each stage, of one thread or summed over several.
struct StageTimes {
  double read = 0, decode = 0, augment = 0;
  StageTimes operator-(const StageTimes& o) const { return {read - o.read, decode - o.decode, augment - o.augment}; }
  StageTimes& operator+=(const StageTimes& o) {
    read += o.read, decode += o.decode, augment += o.augment;
    return *this;
  }
};

/// What this thread has spent so far, whatever it worked for.
const StageTimes& stage_times();

/// RAII: while this lives, the thread's time counts for a stage. Inside another one it interrupts that: no time counts twice.
class StageScope {
 public:
  explicit StageScope(Stage stage);
  ~StageScope();
  StageScope(const StageScope&) = delete;
  StageScope& operator=(const StageScope&) = delete;

 private:
  Stage outer_;
};

}  // namespace mesa
