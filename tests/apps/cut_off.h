// Runs that are cut off at any moment: what they must leave on the disk.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <map>

#include "apps/tiny_run.h"
#include "mesa/train/files.h"
#include "support/random.h"

namespace mesa::testing {

/// A whole number from the environment.
inline uint64_t wish(const char* variable, uint64_t otherwise) {
  const char* text = std::getenv(variable);
  return text != nullptr ? std::strtoull(text, nullptr, 10) : otherwise;
}

/// The lines of metrics.jsonl that are whole, by step.
inline std::map<int64_t, Json> curve_so_far(const TinyRun& tiny, const std::string& run) {
  std::map<int64_t, Json> rows;
  if (!tiny.exists(run + "/metrics.jsonl")) return rows;
  std::istringstream lines(read_text(tiny.path(run + "/metrics.jsonl")));
  for (std::string line; std::getline(lines, line);) {
    const Json row = Json::parse(line, nullptr, false);
    if (row.is_object()) rows[row["step"]] = {row["loss"], row["grad_norm"], row["lr"]};
  }
  return rows;
}

/// A run that was cut off has left whole checkpoints, none older than at step `reached`, and a curve that is that of `straight`.
/// Returns the step to resume from, 0 without a checkpoint.
inline int64_t check_left(const TinyRun& tiny, const std::string& run, const std::map<int64_t, Json>& straight, int64_t reached) {
  for (const auto& [step, row] : curve_so_far(tiny, run)) {
    CAPTURE(step);
    CHECK(row == straight.at(step));
  }
  const std::filesystem::path folder = tiny.path(run + "/checkpoints");
  int left = 0;
  int64_t newest = 0;
  if (std::filesystem::exists(folder))
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
      CAPTURE(entry.path().string());
      const bool leftover = entry.path().extension() == ".tmp";  // which the next process clears
      left += !leftover;
      if (leftover) continue;
      CHECK_NOTHROW(mesa::verify_folder(entry.path().string()));
      // Between two renames the one that was `last` has its new name already.
      if (entry.path().filename() != "best")
        newest = std::max<int64_t>(newest, Json::parse(read_text(entry.path() / "state.json"))["step"]);
    }
  CHECK(left <= 5);  // the oldest goes once the newest is there
  CHECK(newest >= reached);
  return newest;
}

}  // namespace mesa::testing
