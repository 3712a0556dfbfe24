// How a run on several ranks ends before its time: by a signal to one, or by what only one of them cannot do.
#include <signal.h>

#include <thread>

#include "apps/rank_run.h"

using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

bool is_rank(pid_t process, int rank) {
  std::ifstream file(mesa::concat("/proc/", process, "/environ"), std::ios::binary);
  const std::string variables((std::istreambuf_iterator<char>(file)), {});
  return variables.find(mesa::concat("OMPI_COMM_WORLD_RANK=", rank) + '\0') != std::string::npos;
}

/// Waits until metrics.jsonl has the step's row.
bool reaches(const TinyRun& run, const std::string& output, int64_t step) {
  const std::string row = mesa::concat("{\"step\":", step, ",");
  for (int wait = 0; wait < 600; ++wait) {
    const std::string file = output + "/metrics.jsonl";
    if (run.exists(file) && read_text(run.path(file)).find(row) != std::string::npos) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  return false;
}

}  // namespace

TEST_CASE("ranks: a signal to one during an evaluation stops all soon, with a checkpoint", "[ranks]") {
  if (!has_mpirun()) return;
  const RankRun run;
  const Args sets{"train.epochs=2", "storage=exact"};
  const auto stopped = run.start_on(2, with(sets, {"data.test_size=2000000"}), "run-in-evaluation");  // of minutes
  REQUIRE(reaches(run, "run-in-evaluation", 6));
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  const auto start = std::chrono::steady_clock::now();
  for (const pid_t process : ranks_of("run-in-evaluation"))
    if (is_rank(process, 1)) kill(process, SIGUSR1);
  const ProcessResult result = stopped->finish(std::chrono::seconds(60));
  INFO(result.err);
  CHECK(result.code == 75);
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(6));  // not a rank's timeout
  CHECK_THAT(result.err, Contains("stopped by signal 10 after step 6"));
  const ProcessResult resumed = run.train_on(2, sets, "run-in-evaluation", {"--resume"});
  INFO(resumed.err);
  CHECK(resumed.code == 0);
  CHECK(run.curve("run-in-evaluation").size() == 3);  // the evaluation was made again
}
