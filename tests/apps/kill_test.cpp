// kill -9 at random moments of a run that writes a checkpoint after each step: it always resumes, and onto the same curve.
#include <signal.h>

#include <chrono>
#include <cstdlib>
#include <random>
#include <set>
#include <thread>

#include "apps/tiny_run.h"
#include "mesa/train/files.h"

using namespace mesa::testing;
using Catch::Matchers::Contains;
namespace fs = std::filesystem;

namespace {

const Args kSets{"train.checkpoint_interval=1", "train.keep=2",      "train.epochs=40",    "train.ema_decay=0.9", "storage=mesa",
                 "data.train_size=128",         "data.test_size=16", "model.drop_rate=0.1"};

/// The lines of metrics.jsonl that are whole, by step.
std::map<int64_t, Json> curve_so_far(const TinyRun& tiny, const std::string& run) {
  std::map<int64_t, Json> rows;
  if (!tiny.exists(run + "/metrics.jsonl")) return rows;
  std::istringstream lines(read_text(tiny.path(run + "/metrics.jsonl")));
  for (std::string line; std::getline(lines, line);) {
    const Json row = Json::parse(line, nullptr, false);
    if (row.is_object()) rows[row["step"]] = {row["loss"], row["grad_norm"], row["lr"]};
  }
  return rows;
}

struct Killer {
  TinyRun tiny;
  std::mt19937_64 random;
  std::map<int64_t, Json> straight;
  int kills = 0, resumable = 0, runs = 0;
  int64_t reached = 0;  // by the present run

  explicit Killer(uint64_t seed) : random(seed) {
    REQUIRE(tiny.train(kSets, "straight").code == 0);
    straight = curve_so_far(tiny, "straight");
    REQUIRE(straight.size() == 320);
  }

  /// One run that is killed, perhaps before it has begun, perhaps while it ends. False if it came to its end.
  bool kill_one(const std::string& run) {
    Process process = tiny.start(kSets, run, {"--resume", "--quiet"});
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 500'000));
    process.send(SIGKILL);
    const ProcessResult result = process.finish();
    INFO(result.err);
    REQUIRE((result.code == 128 + SIGKILL || result.code == 0));
    CHECK_THAT(result.err, !Contains("cannot be used"));
    if (result.code == 0) return false;
    ++kills;
    check_left(run);
    return true;
  }

  /// What a run that was killed has left: whole checkpoints, none older than before, and a curve that is that of the straight run.
  void check_left(const std::string& run) {
    for (const auto& [step, row] : curve_so_far(tiny, run)) {
      CAPTURE(step);
      CHECK(row == straight.at(step));
    }
    const fs::path folder = tiny.path(run + "/checkpoints");
    if (!fs::exists(folder)) return;  // killed before the first step
    int left = 0;
    for (const auto& entry : fs::directory_iterator(folder)) {
      CAPTURE(entry.path().string());
      const bool leftover = entry.path().extension() == ".tmp";  // which the next process clears
      left += !leftover;
      if (!leftover) CHECK_NOTHROW(mesa::verify_folder(entry.path().string()));
    }
    CHECK(left <= 5);  // the oldest goes once the newest is there
    if (!fs::exists(folder / "last")) return;
    const int64_t step = tiny.json(run + "/checkpoints/last/state.json")["step"];
    CHECK(step >= reached);
    reached = step;
    ++resumable;
  }

  void check_end(const std::string& run) {
    REQUIRE(tiny.train(kSets, run, {"--resume", "--quiet"}).code == 0);
    CHECK(curve_so_far(tiny, run) == straight);
    CHECK(tiny.curve(run) == tiny.curve("straight"));
    for (const char* file : {"/checkpoints/last/model.safetensors", "/checkpoints/last/ema.safetensors",
                             "/checkpoints/last/state.safetensors", "/checkpoints/best/model.safetensors"}) {
      CAPTURE(file);
      CHECK(read_text(tiny.path(run + file)) == read_text(tiny.path("straight" + std::string(file))));
    }
    std::set<std::string> names;
    for (const auto& entry : fs::directory_iterator(tiny.path(run + "/checkpoints"))) names.insert(entry.path().filename().string());
    CHECK(names == std::set<std::string>{"best", "last", "step-00000318", "step-00000319"});
    fs::remove_all(tiny.path(run));
    ++runs;
    reached = 0;
  }
};

}  // namespace

TEST_CASE("kill: a run that is killed again and again ends as one that never was", "[slow]") {
  const char* number = std::getenv("MESA_TEST_KILLS");
  const char* chosen = std::getenv("MESA_TEST_SEED");
  const int wanted = number != nullptr ? std::atoi(number) : 200;
  const uint64_t seed = chosen != nullptr ? std::strtoull(chosen, nullptr, 10) : std::random_device{}();
  CAPTURE(seed);
  Killer killer(seed);
  int in_this_run = 0;
  while (killer.kills < wanted) {
    const std::string run = "killed" + std::to_string(killer.runs);
    // A run may come to its end; after 25 kills it is let.
    if (!killer.kill_one(run) || ++in_this_run == 25) killer.check_end(run), in_this_run = 0;
  }
  if (in_this_run > 0) killer.check_end("killed" + std::to_string(killer.runs));
  WARN("seed " << seed << ": " << killer.kills << " kills, " << killer.resumable << " of them with a checkpoint on the disk; "
               << killer.runs << " runs ended bit for bit as the one that was never killed");
  CHECK(killer.resumable > wanted / 2);
}
