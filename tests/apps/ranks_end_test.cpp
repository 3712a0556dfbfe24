// What one of several ranks does to the others: a signal to it, what it cannot do, how it was started, that it is slow.
#include <signal.h>

#include <thread>

#include "apps/rank_run.h"
#include "mesa/data/dataset.h"
#include "mesa/dist/control.h"
#include "mesa/train/files.h"

using namespace mesa::testing;
using Catch::Matchers::Contains;
namespace fs = std::filesystem;

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

int count(const std::string& text, const std::string& part) {
  int found = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++found;
  return found;
}

/// 30 pictures to train on, 15 a class, and 6 to test on.
struct PictureRun : RankRun {
  PictureRun() {
    batch = 6;
    for (int i = 0; i < 36; ++i) write(name(i), picture(i));
  }
  static std::string name(int64_t i) {
    if (i >= 30) return mesa::concat("pictures/val/", i % 2 == 0 ? "a/" : "b/", i, ".png");
    return mesa::concat("pictures/train/", i < 15 ? "a/" : "b/", 10 + i, ".png");
  }
  static std::string picture(int64_t i) {
    const Bytes bytes = encode_png(test_image(16 + static_cast<int>(i), 16, 3));
    return {bytes.begin(), bytes.end()};
  }
  void write(const std::string& file, const std::string& text) const {
    fs::create_directories(fs::path(path(file)).parent_path());
    TinyRun::write(file, text);
  }
};

const Args kPictures{"data.kind=image_folder",
                     "data.path=pictures",
                     "data.train_size=0",
                     "data.test_size=0",
                     "data.on_bad_sample=error",
                     "storage=exact",
                     "seed=3",
                     "train.epochs=2",
                     "train.checkpoint_interval=2"};

/// Two processes that know each other by plain variables; each has `sets` of its own.
std::vector<ProcessResult> check_comm_plainly(const TinyRun& run, const std::vector<std::string>& sets) {
  const int port = mesa::Listener().port();
  std::vector<std::unique_ptr<Process>> ranks;
  for (size_t r = 0; r < sets.size(); ++r) {
    const Environment env{{"RANK", std::to_string(r)},
                          {"WORLD_SIZE", std::to_string(sets.size())},
                          {"MASTER_ADDR", "127.0.0.1"},
                          {"MASTER_PORT", std::to_string(port)}};
    const Args args{"--config", "tiny.yaml", "--check-comm", "--set", sets[r]};
    ranks.push_back(std::make_unique<Process>("mesa-train", args, env, run.path(".")));
  }
  std::vector<ProcessResult> results;
  for (const auto& rank : ranks) results.push_back(rank->finish(std::chrono::seconds(60)));
  return results;
}

}  // namespace

TEST_CASE("ranks: a signal to one during an evaluation stops all soon, with a checkpoint", "[ranks]") {
  if (!has_mpirun()) return;
  const RankRun run;
  const Args sets{"train.epochs=2", "storage=exact"};
  const auto stopped = run.start_on(2, with(sets, {"data.test_size=2000000"}), "run-in-evaluation");  // of minutes
  REQUIRE(reaches(run, "run-in-evaluation", 6));
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  for (const pid_t process : ranks_of("run-in-evaluation"))
    if (is_rank(process, 1)) kill(process, SIGUSR1);
  const ProcessResult result = stopped->finish(std::chrono::seconds(60));
  INFO(result.err);
  CHECK(result.code == 75);  // that of a rank's timeout is another
  CHECK_THAT(result.err, Contains("stopped by signal 10 after step 6"));
  const ProcessResult resumed = run.train_on(2, sets, "run-in-evaluation", {"--resume"});
  INFO(resumed.err);
  CHECK(resumed.code == 0);
  CHECK(run.curve("run-in-evaluation").size() == 3);  // the evaluation was made again
}

TEST_CASE("ranks: an error of one in mid-run ends all as an error, and the run goes on once it is mended", "[ranks]") {
  if (!has_mpirun()) return;
  const PictureRun run;
  REQUIRE(run.train_on(3, kPictures, "straight").code == 0);
  const std::vector<int64_t> order = mesa::permutation(30, 3, "data.order", 0);
  for (const int victim : {1, 0}) {
    CAPTURE(victim);
    const int64_t damaged = order[static_cast<size_t>(4 * 6 + victim * 2)];  // of the fifth and last batch
    const std::string file = PictureRun::name(damaged), output = mesa::concat("broken", victim);
    run.write(file, run.picture(damaged).substr(0, 40));
    std::string command = "$BIN/mesa-train";
    for (const std::string& arg : run.train_args(with(kPictures, {run.batch_of(3)}), output)) command += " '" + arg + "'";
    command += "; code=$?; echo $code > code.$OMPI_COMM_WORLD_RANK; exit $code";
    const ProcessResult result = run.start_shells(3, "trap '' TERM; " + command, {"--mca", "odls_base_sigkill_timeout", "6"})->finish();
    INFO(result.err);
    CHECK(result.code == 1);
    for (const int rank : {0, 1, 2}) CHECK(read_text(run.path(mesa::concat("code.", rank))) == "1\n");
    const std::string who = mesa::concat("rank ", victim, " (");
    CHECK_THAT(result.err, Contains(who) && Contains(") failed at step 4, collective ") && Contains(file));
    CHECK(count(result.err, ") failed at step 4") == 1);
    CHECK_NOTHROW(mesa::verify_folder(run.path(output + "/checkpoints/last")));
    CHECK(run.json(output + "/checkpoints/last/state.json")["step"] == 4);
    run.write(file, run.picture(damaged));
    const ProcessResult resumed = run.train_on(3, kPictures, output, {"--resume"});
    INFO(resumed.err);
    CHECK(resumed.code == 0);
    CHECK(run.metrics(output) == run.metrics("straight"));
    CHECK(run.weights(output) == run.weights("straight"));
  }
}

TEST_CASE("ranks: --check-comm refuses ranks that differ before any collective, and says who they are", "[ranks]") {
  const TinyRun run;
  const auto results = check_comm_plainly(run, {"seed=0", "seed=1"});
  INFO(results[0].out << results[0].err << results[1].err);
  for (const ProcessResult& result : results) CHECK(result.code == 1);
  CHECK_THAT(results[0].out, Contains("rank 0: host ") && Contains("rank 1: host ") && Contains("local rank 1"));
  CHECK_THAT(results[0].err, Contains("ranks 0 and 1 differ in config: 'seed: 0' and 'seed: 1'"));
  CHECK(results[1].err.empty());
}

TEST_CASE("ranks: what ranks cannot do without MPI is said, and so is what srun has not done", "[ranks]") {
  const TinyRun run;
  const auto results = check_comm_plainly(run, {"seed=0", "seed=0"});
  INFO(results[0].out << results[0].err << results[1].err);
  for (const ProcessResult& result : results) CHECK(result.code == 1);
  CHECK_THAT(results[0].err, Contains("the CPU engine's ranks talk through MPI: start them with mpirun"));
  CHECK(results[1].err.empty());

  const auto in = [&](const Environment& env) {
    return mesa::testing::run("mesa-train", {"--config", "tiny.yaml", "--output", "out"}, env, run.path("."));
  };
  const Environment tasks{{"SLURM_STEP_NUM_TASKS", "4"}, {"SLURM_PROCID", "2"}};
  const ProcessResult apart = in(tasks);
  CHECK(apart.code == 1);
  CHECK_THAT(apart.err, Contains("srun started 4 tasks that do not know of each other") && Contains("--mpi=pmix"));
  CHECK_FALSE(run.exists("out"));
  Environment alone = tasks;
  alone.insert({{"RANK", "0"}, {"WORLD_SIZE", "1"}});
  CHECK(in(alone).code == 0);
}

#ifndef __SANITIZE_ADDRESS__  // whose own library must be loaded first
TEST_CASE("ranks: a build without MPI says so to its launcher", "[ranks]") {
  const TinyRun run;
  const fs::path library = fs::path(MESA_BIN_DIR).parent_path() / "libmesa.so";
  fs::create_symlink(fs::canonical(library), run.path("libmesa.so"));  // a folder without plugins
  const Environment env{{"OMPI_COMM_WORLD_SIZE", "2"}, {"LD_PRELOAD", run.path("libmesa.so")}};
  const ProcessResult result = mesa::testing::run("mesa-train", {"--config", "tiny.yaml", "--output", "out"}, env, run.path("."));
  CHECK(result.code == 1);
  CHECK_THAT(result.err, Contains("was started by MPI's launcher and needs MPI") && Contains("which this build of Mesa has not"));
  CHECK_FALSE(run.exists("out"));
}
#endif

TEST_CASE("ranks: where MPI waits for one that does not come, all others say who they are", "[ranks]") {
  if (!has_mpirun()) return;
  const RankRun run;
  const ProcessResult result =
      run.start_shells(3, "[[ $OMPI_COMM_WORLD_RANK != 1 ]] || exec sleep 120; exec $BIN/mesa-train --config tiny.yaml --check-comm")
          ->finish(std::chrono::seconds(100));
  INFO(result.err);
  CHECK(result.code == 69);
  CHECK_THAT(result.err, Contains("error: rank 0 (") && Contains("error: rank 2 (") && Contains("MPI has not answered for 8 seconds"));
  CHECK_THAT(result.err, !Contains("error: rank 1 ("));
}

TEST_CASE("ranks: one that all wait for is named in metrics.jsonl, and warned of once", "[ranks]") {
  if (!has_mpirun()) return;
  const PictureRun run;
  const Bytes large = encode_png(test_image(1300, 1300, 3));  // that rank 1 reads in place of the small ones
  for (int i = 0; i < 36; ++i) run.write("slow/" + PictureRun::name(i), {large.begin(), large.end()});
  std::string command = "[[ $OMPI_COMM_WORLD_RANK != 1 ]] || cd slow; exec $BIN/mesa-train";
  const Args sets{run.batch_of(2), "train.epochs=20", "train.log_interval=10", "train.checkpoint_interval=0"};  // no disk slows rank 0
  Args args = run.train_args(with(kPictures, sets), run.path("out"));
  args[1] = run.path("tiny.yaml");
  for (const std::string& arg : args) command += " '" + arg + "'";
  const ProcessResult result = run.start_shells(2, command)->finish();
  INFO(result.err);
  REQUIRE(result.code == 0);
  CHECK(count(result.err, "warning: rank 1 takes ") == 1);
  std::istringstream lines(read_text(run.path("out/metrics.jsonl")));
  int rows = 0;
  for (std::string line; std::getline(lines, line); ++rows) {
    const Json row = Json::parse(line);
    const double first = row["rank_seconds"][0], second = row["rank_seconds"][1];
    CHECK(row["slowest_rank"] == (second > first ? 1 : 0));
    CHECK(row["slowest_ratio"].get<double>() == Approx(std::max(first, second) / std::min(first, second)));
    if (rows > 0) CHECK((row["slowest_rank"] == 1 && row["slowest_ratio"] > 1.5));  // in the first rank 0 also writes the run's folder
  }
  CHECK(rows == 10);
}
