// Training over two hosts: the curve of one rank, and an end on both sides when the cable between them is cut.
#include "apps/tiny_run.h"
#include "mesa/base/error.h"
#include "mesa/train/files.h"
#include "support/mpirun.h"
#include "support/two_hosts.h"

using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

const Args kLong{"train.batch_size=4", "train.epochs=100000", "train.checkpoint_interval=3", "schedule.name=constant", "storage=exact"};

struct HostsRun : TinyRun {
  std::unique_ptr<TwoHosts> hosts = has_mpirun() ? TwoHosts::make() : nullptr;

  ProcessResult run(const Args& args) const {
    return hosts->mpirun({}, "mesa-train", args, {}, path("."))->finish(std::chrono::seconds(60));
  }
  /// A run that has lost its cable.
  std::unique_ptr<Process> lose(const Args& options, const std::string& timeout) const {
    auto lost = hosts->mpirun(options, "mesa-train", train_args(kLong, "lost"), {{"MESA_RANK_TIMEOUT", timeout}}, path("."));
    REQUIRE(lost->wait_for("epoch 2/"));
    CHECK(hosts->running("mesa-train").size() == 4);
    hosts->cut();
    return lost;
  }
  void check_resumes() const {
    CHECK_NOTHROW(mesa::verify_folder(path("lost/checkpoints/last")));
    const int64_t step = json("lost/checkpoints/last/state.json")["step"];
    const ProcessResult resumed = train(
        {"train.epochs=100000", mesa::concat("train.steps=", step + 3), "schedule.name=constant", "storage=exact"}, "lost", {"--resume"});
    INFO(resumed.err);
    CHECK(resumed.code == 0);
    CHECK(json("lost/summary.json")["steps"] == step + 3);
  }
};

}  // namespace

TEST_CASE("hosts: two with two ranks each train as one rank does", "[ranks]") {
  const HostsRun run;
  if (!run.hosts) return;
  const ProcessResult there = run.run({"--config", "tiny.yaml", "--check-comm"});
  INFO(there.out << there.err);
  REQUIRE(there.code == 0);
  for (const char* text : {"rank 0: host mesa-a, local rank 0", "rank 1: host mesa-a, local rank 1", "rank 2: host mesa-b, local rank 0",
                           "rank 3: host mesa-b, local rank 1", "all 4 ranks are there"})
    CHECK_THAT(there.out, Contains(text));

  const Args sets{"storage=exact", "train.epochs=9", "model.drop_path=0.2", "model.drop_rate=0.1", "data.mixup=0.8"};
  REQUIRE(run.train(sets, "one").code == 0);
  Args parts = sets;
  parts.push_back("train.batch_size=4");
  const ProcessResult result = run.run(run.train_args(parts, "four"));
  INFO(result.err);
  REQUIRE(result.code == 0);
  CHECK(run.metrics("one").size() >= 50);
  check_close(run.metrics("one"), run.metrics("four"), 1e-5);
}

TEST_CASE("hosts: a cut cable ends the ranks on both sides, and each side says whom it lost", "[ranks]") {
  const HostsRun run;
  if (!run.hosts) return;
  const auto lost = run.lose({"--output-filename", run.path("said")}, "8");
  CHECK(run.hosts->all_gone(std::chrono::seconds(20), "mesa-train"));
  const auto said = [&](int rank) { return read_text(run.path(mesa::concat("said/1/rank.", rank, "/stderr"))); };
  CHECK_THAT(said(0), Contains("(mesa-b) has not answered for") && Contains("last heard of at step"));
  CHECK_THAT(said(2) + said(3), Contains("error: rank 0 (mesa-a) has not answered for") && Contains("last heard of at step"));
  CHECK_THAT(said(1), !Contains("error: "));
  CHECK_THAT(said(3), !Contains("error: "));
  run.check_resumes();
}

TEST_CASE("hosts: where mpirun looks after its connections, a cut cable ends it too", "[ranks][slow]") {
  const HostsRun run;
  if (!run.hosts) return;
  // As docs/distributed.md recommends, but faster. The ranks' own patience would last longer.
  Args options;
  for (const auto& [name, value] : {std::pair("oob_tcp_keepalive_time", "3"), std::pair("oob_tcp_keepalive_intvl", "1"),
                                    std::pair("oob_tcp_keepalive_probes", "3"), std::pair("odls_base_sigkill_timeout", "4")})
    options.insert(options.end(), {"--mca", name, value});
  const auto lost = run.lose(options, "60");
  const auto start = std::chrono::steady_clock::now();
  const ProcessResult result = lost->finish(std::chrono::seconds(40));
  INFO(result.err);
  CHECK_FALSE(result.timed_out);
  CHECK(result.code != 0);
  CHECK(run.hosts->all_gone(std::chrono::seconds(10)));
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(28));  // in which the ranks alone would not have noticed
  CHECK_THAT(result.err, Contains("(mesa-b) has not answered for") && Contains("last heard of at step"));
  CHECK_THAT(read_text(run.path("lost/errors.txt")), Contains("rank 2 (mesa-b): rank 0 (mesa-a) has not answered for"));
  run.check_resumes();
}
