// scripts/slurm.sh with stand-ins for srun and scontrol: when a job goes into the queue again.
#include <signal.h>

#include "apps/tiny_run.h"
#include "mesa/base/error.h"
#include "mesa/dist/control.h"
#include "support/paths.h"

using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

struct SlurmRun : TinyRun {
  SlurmRun() {
    program("srun", "echo \"$@\" >> srun.txt; while [[ $1 == --* ]]; do shift; done; exec \"$@\"");  // one rank
    program("scontrol", "echo \"$@\" >> scontrol.txt");
  }
  void program(const std::string& name, const std::string& body) const {
    write(name, "#!/bin/bash\n" + body + "\n");
    std::filesystem::permissions(path(name), std::filesystem::perms::owner_all);
  }
  std::unique_ptr<Process> start(const Args& args, Environment env = {}) const {
    env.insert({{"PATH", path(".") + ":" + std::getenv("PATH")}, {"SLURM_JOB_ID", "17"}, {"SLURM_JOB_NAME", "small"}});
    env.insert({"MESA_TRAIN", std::string(MESA_BIN_DIR) + "/mesa-train"});
    Args all{"bash", source_dir() + "/scripts/slurm.sh"};
    all.insert(all.end(), args.begin(), args.end());
    return std::make_unique<Process>("/usr/bin/env", all, env, path("."));
  }
  std::string requeued() const { return exists("scontrol.txt") ? read_text(path("scontrol.txt")) : ""; }
};

}  // namespace

TEST_CASE("slurm: the time limit ends in the queue, and the job resumes from there") {
  const SlurmRun run;
  const Args args{"--config", "tiny.yaml", "--set", "train.epochs=100000", "--set", "storage=exact"};
  const auto first = run.start(args);
  REQUIRE(first->wait_for("epoch 2/"));
  first->send(SIGUSR1);
  const ProcessResult result = first->finish(std::chrono::seconds(30));
  INFO(result.err << result.out);
  CHECK(result.code == 75);
  CHECK(run.requeued() == "requeue 17\n");
  CHECK_THAT(read_text(run.path("srun.txt")), Contains("--mpi=pmix --cpus-per-task=1 "));
  const int64_t step = run.json("runs/small-17/checkpoints/last/state.json")["step"];
  Args more = args;
  more.insert(more.end(), {"--set", mesa::concat("train.steps=", step + 2)});
  const ProcessResult second = run.start(more, {{"SLURM_RESTART_COUNT", "1"}})->finish(std::chrono::seconds(60));
  INFO(second.err);
  CHECK(second.code == 0);
  CHECK_THAT(second.err, Contains("resumed from"));
  CHECK(run.requeued() == "requeue 17\n");
}

TEST_CASE("slurm: a cancelled job stays cancelled, a lost rank restarts it a few times, and an error never") {
  const SlurmRun run;
  run.program("stopped", "exit 75");
  run.program("lost", "exit 69");
  run.program("wrong", "exit 2");
  const auto code = [&](const std::string& train, const std::string& restarts) {
    Environment env{{"MESA_TRAIN", run.path(train)}, {"SLURM_RESTART_COUNT", restarts}};
    return run.start({}, env)->finish(std::chrono::seconds(30)).code;
  };
  CHECK(code("stopped", "0") == 75);
  CHECK(code("lost", "3") == 69);
  CHECK(code("wrong", "0") == 2);
  CHECK(run.requeued().empty());
  CHECK(code("lost", "2") == 69);
  CHECK(run.requeued() == "requeue 17\n");
  const ProcessResult outside = mesa::testing::run("/usr/bin/env", {"bash", source_dir() + "/scripts/slurm.sh"});
  CHECK(outside.code == 2);
  CHECK_THAT(outside.err, Contains("no Slurm job"));
}

TEST_CASE("slurm: srun returns the highest code of its tasks: what one of them cannot do is no reason to try again, a lost one is") {
  const SlurmRun run;
  // Three tasks that know each other by plain variables, which is enough until gradients meet.
  run.program(
      "srun",
      mesa::concat("while [[ $1 == --* ]]; do shift; done\n"
                   "export WORLD_SIZE=3 MASTER_ADDR=127.0.0.1 MASTER_PORT=",
                   mesa::Listener().port(), " MESA_RANK_TIMEOUT=8\n",
                   "for r in 0 1 2; do RANK=$r \"$@\" & tasks[r]=$!; done\n"
                   "highest=0\n"
                   "for r in 0 1 2; do wait ${tasks[r]}; code=$?; echo $code >> codes.txt; ((code <= highest)) || highest=$code; done\n"
                   "exit $highest"));
  run.program("differs", "exec " MESA_BIN_DIR "/mesa-train \"$@\" --set seed=$RANK");
  run.program("lost", "[[ $RANK != 2 ]] || exec sleep 10; exec " MESA_BIN_DIR "/mesa-train \"$@\"");
  const auto result_of = [&](const std::string& train) {
    return run.start({"--config", "tiny.yaml"}, {{"MESA_TRAIN", run.path(train)}})->finish(std::chrono::seconds(60));
  };
  const ProcessResult differs = result_of("differs");
  INFO(differs.err);
  CHECK(differs.code == 1);
  CHECK(read_text(run.path("codes.txt")) == "1\n1\n1\n");
  CHECK_THAT(differs.err, Contains("ranks 0 and 1 differ in config"));
  CHECK(run.requeued().empty());

  std::filesystem::remove(run.path("codes.txt"));
  const ProcessResult lost = result_of("lost");
  INFO(lost.err);
  CHECK(lost.code == 69);
  CHECK(read_text(run.path("codes.txt")) == "69\n69\n0\n");
  CHECK_THAT(lost.err, Contains("did not come") && Contains("within 8 seconds: 2"));
  CHECK(run.requeued() == "requeue 17\n");
}
