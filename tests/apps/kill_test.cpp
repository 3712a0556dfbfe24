// kill -9 at random moments of a run that writes a checkpoint after each step: it always resumes, and onto the same curve.
#include <signal.h>

#include <chrono>
#include <random>
#include <set>
#include <thread>

#include "apps/cut_off.h"

using namespace mesa::testing;
using Catch::Matchers::Contains;
namespace fs = std::filesystem;

namespace {

const Args kSets{"train.checkpoint_interval=1", "train.keep=2",      "train.epochs=40",    "train.ema_decay=0.9", "storage=mesa",
                 "data.train_size=128",         "data.test_size=16", "model.drop_rate=0.1"};

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
    reached = check_left(tiny, run, straight, reached);
    resumable += reached > 0;
    return true;
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
  const int wanted = static_cast<int>(wish("MESA_TEST_KILLS", 200));
  const uint64_t seed = test_seed();
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
