// Training on several ranks: the same numbers as on one, and stops and resumes in common.
#include <signal.h>

#include <cmath>
#include <filesystem>

#include "apps/rank_run.h"
#include "mesa/train/files.h"

using namespace mesa::testing;
using Catch::Matchers::Contains;
namespace fs = std::filesystem;

namespace {

/// Everything that draws random numbers for a sample or an element is on.
const Args kRandom{"model.drop_path=0.2",       "model.drop_rate=0.1", "data.mixup=0.8", "data.cutmix=1",
                   "data.mix_mode=elem",        "data.flip=0.5",       "data.repeats=2", "storage=exact",
                   "train.ema_decay=0.9",       "train.clip_norm=1",   "train.epochs=9", "schedule.warmup_epochs=1",
                   "optimizer.lr_base_batch=16"};  // of the global batch, whoever has which part of it

}  // namespace

TEST_CASE("ranks: the same curve on 1, 2 and 4, and bit for bit on as many", "[ranks]") {
  if (!has_mpirun()) return;
  const RankRun run;
  REQUIRE(run.train_on(1, kRandom, "one").code == 0);
  const auto one = run.metrics("one");
  CHECK(one.size() >= 50);
  for (const int n : {2, 4}) {
    CAPTURE(n);
    const ProcessResult result = run.train_on(n, kRandom, mesa::concat("run", n));
    INFO(result.err);
    REQUIRE(result.code == 0);
    check_close(one, run.metrics(mesa::concat("run", n)), 1e-5);
    const std::string line = read_text(run.path(mesa::concat("run", n, "/metrics.jsonl")));
    const Json first = Json::parse(line.substr(0, line.find('\n')));
    CHECK(first["rank_seconds"].size() == static_cast<size_t>(n));
    CHECK(first["sync_wait"] >= 0);
    const size_t slowest = first["slowest_rank"];
    for (const Json& seconds : first["rank_seconds"]) CHECK(seconds <= first["rank_seconds"].at(slowest));
    CHECK(first["slowest_ratio"] >= 1);
    const auto a = run.curve("one"), b = run.curve(mesa::concat("run", n));
    REQUIRE(a.size() == b.size());
    for (size_t i = 1; i < a.size(); ++i) CHECK(std::stod(a[i][2]) == Approx(std::stod(b[i][2])).epsilon(1e-4));  // the evaluation's loss
  }
  REQUIRE(run.train_on(2, kRandom, "again").code == 0);
  CHECK(run.metrics("again") == run.metrics("run2"));
  CHECK(run.weights("again") == run.weights("run2"));
}

TEST_CASE("ranks: LoRA trains on two as on one", "[ranks]") {
  if (!has_mpirun()) return;
  const RankRun run;
  REQUIRE(run.train({}, "base").code == 0);
  const Args sets = with(kRandom, {"train.weights=base", "lora.rank=4", "lora.targets=[blocks.*]", "lora.dropout=0.1"});
  REQUIRE(run.train_on(1, sets, "one").code == 0);
  const ProcessResult result = run.train_on(2, sets, "two");
  INFO(result.err);
  REQUIRE(result.code == 0);
  check_close(run.metrics("one"), run.metrics("two"), 1e-5);
}

TEST_CASE("ranks: classes are counted exactly, whichever rank evaluates which pictures", "[ranks][slow]") {
  if (!has_mpirun()) return;
  const RankRun run;
  const Args sets{"data.test_size=61", "train.epochs=1", "optimizer.lr=1e-12", "train.eval_batch_size=5", "storage=exact"};
  REQUIRE(run.train_on(1, sets, "one").code == 0);
  REQUIRE(run.train_on(3, sets, "three").code == 0);
  const Json counts = run.json("one/confusion.json");
  int64_t images = 0;
  for (const Json& cell : counts["cells"]) images += cell[2].get<int64_t>();
  CHECK(images == 61);
  CHECK(run.json("three/confusion.json") == counts);
  CHECK(read_text(run.path("three/classes.csv")) == read_text(run.path("one/classes.csv")));

  Json results[2];
  for (const int n : {1, 3}) {
    const Args args{"one", "--json", "o.json", "--per-class=c.csv", "--confusion", "c.png", "--batch-size", "4"};
    const ProcessResult result = mpirun(n, "mesa-eval", args, {}, run.path("."));
    INFO(result.err);
    REQUIRE(result.code == 0);
    CHECK(result.out.find("top-1 ") == result.out.rfind("top-1 "));  // the leader alone speaks
    results[n / 3] = run.json("o.json");
    results[n / 3].erase("images_per_second");
  }
  CHECK(results[1]["loss"].get<double>() == Approx(results[0]["loss"].get<double>()));
  for (Json& result : results) result.erase("loss");
  CHECK(results[0] == results[1]);
  CHECK(results[0]["confusion"] == counts["cells"]);
  const ProcessResult missing = mpirun(3, "mesa-eval", {"one", "--real", "nowhere.json"}, {}, run.path("."));
  CHECK(missing.code != 0);
  CHECK_THAT(missing.err, Contains("nowhere.json"));
}

TEST_CASE("ranks: int8 storage, accumulation and a teacher train on two", "[ranks]") {
  if (!has_mpirun()) return;
  const RankRun run;
  REQUIRE(run.train({}, "teacher").code == 0);
  const ProcessResult result =
      run.train_on(2, {"storage=mesa", "train.accumulation=2", "distill.kind=hard", "distill.teacher=teacher"}, "student");
  INFO(result.err);
  CHECK(result.code == 0);
  CHECK(run.json("student/summary.json")["epochs"] == 2);
}

TEST_CASE("ranks: a shared optimizer makes the same steps, and any number of ranks goes on from its checkpoint", "[ranks][slow]") {
  if (!has_mpirun()) return;
  const RankRun run;
  const std::string shared = "train.shard=optimizer";
  for (const std::string optimizer : {"adamw", "lamb"}) {
    CAPTURE(optimizer);
    const Args sets = with(kRandom, {"optimizer.name=" + optimizer, "schedule.name=constant"});
    const std::string one = optimizer + "-1";
    REQUIRE(run.train_on(1, with(sets, {shared}), one).code == 0);  // alone: shared with nobody
    for (const int n : {2, 4}) {
      const std::string name = mesa::concat(optimizer, "-", n);
      const ProcessResult result = run.train_on(n, with(sets, {shared}), name);
      INFO(result.err);
      REQUIRE(result.code == 0);
      check_close(run.metrics(one), run.metrics(name), 1e-5);
    }
    const std::string parted = optimizer + "-parted", whole = optimizer + "-whole";
    REQUIRE(run.train_on(2, with(sets, {shared, "train.steps=20"}), parted).code == 0);
    fs::copy(run.path(parted), run.path(whole), fs::copy_options::recursive);
    REQUIRE(run.train_on(2, with(sets, {shared}), parted, {"--resume"}).code == 0);
    CHECK(run.metrics(parted) == run.metrics(optimizer + "-2"));
    CHECK(run.weights(parted) == run.weights(optimizer + "-2"));
    REQUIRE(run.train_on(4, sets, whole, {"--resume"}).code == 0);  // shared no more
    check_close(run.metrics(one), run.metrics(whole), 1e-5);
  }
}

TEST_CASE("ranks: what four share 1, 2 and 3 go on with, and what nobody shared four do", "[ranks][slow]") {
  if (!has_mpirun()) return;
  RankRun run;
  run.batch = 24;  // which 1, 2, 3 and 4 divide
  const std::string shared = "train.shard=optimizer";
  const Args sets = with(kRandom, {"schedule.name=constant", "train.accumulation=2", "train.frozen=[blocks.0.norm1.*]"});
  REQUIRE(run.train_on(1, sets, "straight").code == 0);
  REQUIRE(run.train_on(4, with(sets, {shared, "train.steps=13", "train.checkpoint_interval=4", "train.keep=2"}), "four").code == 0);
  for (const int n : {1, 2, 3}) {
    const std::string name = mesa::concat("on", n);
    fs::copy(run.path("four"), run.path(name), fs::copy_options::recursive);
    const ProcessResult rest = run.train_on(n, with(sets, {shared}), name, {"--resume"});
    INFO(rest.err);
    REQUIRE(rest.code == 0);
    check_close(run.metrics("straight"), run.metrics(name), 1e-5);
  }
  REQUIRE(run.train_on(1, with(sets, {"train.steps=13"}), "whole").code == 0);
  REQUIRE(run.train_on(4, with(sets, {shared}), "whole", {"--resume"}).code == 0);
  check_close(run.metrics("straight"), run.metrics("whole"), 1e-5);
}

TEST_CASE("ranks: a shared optimizer keeps the copies in bf16 fresh, and goes on where nothing can be written", "[ranks][slow]") {
  if (!has_mpirun()) return;
  const RankRun run;
  const Args mixed{"train.precision=bf16", "train.force_precision=true", "storage=exact",
                   "train.epochs=3",       "train.accumulation=2",       "train.reduce_precision=bf16"};
  for (const std::string shard : {"none", "optimizer"}) REQUIRE(run.train_on(2, with(mixed, {"train.shard=" + shard}), shard).code == 0);
  check_close(run.metrics("none"), run.metrics("optimizer"), 5e-3);

  const Args sets{"train.shard=optimizer", "storage=exact", "train.epochs=3", "train.checkpoint_interval=2"};
  REQUIRE(run.train_on(2, with(sets, {"train.steps=3"}), "full").code == 0);
  fs::remove_all(run.path("full/checkpoints/best"));
  std::ofstream(run.path("full/checkpoints/best")) << "a file where a folder is needed";
  const ProcessResult result = run.train_on(2, sets, "full", {"--resume"});
  INFO(result.err);
  CHECK(result.code == 1);
  CHECK_THAT(result.err, Contains("could not be written") && Contains("done: "));
  CHECK(run.json("full/summary.json")["epochs"] == 3);
}

TEST_CASE("ranks: a shared optimizer takes its part of the memory, as planned", "[ranks]") {
  if (!has_mpirun()) return;
  const RankRun run;
  std::map<std::string, int64_t> peaks;
  for (const std::string shard : {"none", "optimizer"}) {
    // Activations enough that the peak is in a step and not where the leader puts the state together.
    const Args sets{"train.shard=" + shard, "storage=exact", "train.batch_size=24"};
    REQUIRE(mpirun(4, "mesa-train", run.train_args(sets, shard), {}, run.path(".")).code == 0);
    peaks[shard] = run.json(shard + "/summary.json")["peak_bytes"];
    const ProcessResult plan = run.call("mesa-train", run.train_args(sets, "none", {"--dry-run", "--ranks", "4"}));
    INFO(plan.err);
    REQUIRE(plan.code == 0);
    const int64_t predicted = std::stoll(plan.out.substr(plan.out.find("predicted peak") + 14));
    CHECK(std::abs(predicted - peaks[shard]) < peaks[shard] / 10);
  }
  const int64_t parameters = run.json("none/summary.json")["parameters"];
  const int64_t saved = peaks["none"] - peaks["optimizer"];
  CHECK(saved > parameters * 8 * 3 / 4 * 8 / 10);  // of two moments in f32, three quarters, less what is rounded up
}

TEST_CASE("ranks: of gradients that nobody has whole there are no histograms", "[ranks]") {
  if (!has_mpirun()) return;
  const RankRun run;
  for (const std::string shard : {"none", "optimizer"}) {
    REQUIRE(run.train_on(2, {"train.shard=" + shard, "train.tensorboard=true", "train.histograms=[head.weight]"}, shard).code == 0);
    std::string events;
    for (const auto& entry : fs::recursive_directory_iterator(run.path(shard)))
      if (entry.path().filename().string().find("tfevents") != std::string::npos) events += read_text(entry.path().string());
    CHECK_THAT(events, Contains("weight/head.weight"));
    CHECK((events.find("gradient/head.weight") != std::string::npos) == (shard == "none"));
  }
}

TEST_CASE("ranks: a shared optimizer survives steps that are not finite and a signal", "[ranks]") {
  if (!has_mpirun()) return;
  const RankRun run;
  const Args shared{"train.shard=optimizer", "train.epochs=400"};
  const ProcessResult bad = run.train_on(2, with(shared, {"optimizer.lr=1e15", "train.max_bad_steps=3"}), "bad");
  INFO(bad.err);
  CHECK(bad.code == 1);
  CHECK_THAT(bad.err, Contains("3 steps in a row were not finite"));
  CHECK_NOTHROW(
      mesa::verify_folder(run.path(fs::exists(run.path("bad/checkpoints/failed")) ? "bad/checkpoints/failed" : "bad/checkpoints/last")));
  const auto stopped = run.start_on(2, shared, "stopped");
  REQUIRE(stopped->wait_for("epoch 2/400"));
  stopped->send(SIGUSR1);
  const ProcessResult result = stopped->finish();
  INFO(result.err);
  CHECK(result.code == 75);
  CHECK(run.train_on(2, with(shared, {"train.epochs=4"}), "stopped", {"--resume"}).code == 0);
}

TEST_CASE("ranks: gradients reduced in bf16 train nearly alike", "[ranks]") {
  if (!has_mpirun()) return;
  const RankRun run;
  const Args sets{"storage=exact", "train.epochs=4", "optimizer.name=sgd", "optimizer.lr=0.01"};
  REQUIRE(run.train_on(2, sets, "fp32").code == 0);
  for (const std::string shard : {"none", "optimizer"}) {
    REQUIRE(run.train_on(2, with(sets, {"train.reduce_precision=bf16", "train.shard=" + shard}), "bf16-" + shard).code == 0);
    check_close(run.metrics("fp32"), run.metrics("bf16-" + shard), 2e-3);
    CHECK(run.metrics("fp32") != run.metrics("bf16-" + shard));
  }
  check_close(run.metrics("bf16-none"), run.metrics("bf16-optimizer"), 1e-4);
}

TEST_CASE("ranks: running ranges are those of all ranks, so that a resumed run goes on bit for bit", "[ranks]") {
  if (!has_mpirun()) return;
  const RankRun run;
  const Args sets = with(kRandom, {"storage=mesa", "model.attention=explicit", "schedule.name=constant"});
  REQUIRE(run.train_on(2, sets, "straight").code == 0);
  REQUIRE(run.train_on(2, with(sets, {"train.steps=20"}), "parted").code == 0);
  const ProcessResult rest = run.train_on(2, sets, "parted", {"--resume"});
  INFO(rest.err);
  REQUIRE(rest.code == 0);
  CHECK(run.metrics("parted") == run.metrics("straight"));
  CHECK(run.weights("parted") == run.weights("straight"));
  for (const bool synchronized : {false, true}) {
    const std::string name = synchronized ? "together" : "apart";
    REQUIRE(run.train_on(2, with(sets, {mesa::concat("train.range_sync=", synchronized ? "true" : "false")}), name).code == 0);
  }
  CHECK(run.weights("together") == run.weights("straight"));
  CHECK(run.weights("apart") != run.weights("straight"));
}

TEST_CASE("ranks: steps that are not finite are skipped by all, and stop all", "[ranks]") {
  if (!has_mpirun()) return;
  const RankRun run;
  const ProcessResult result = run.train_on(2, {"optimizer.lr=1e15", "train.max_bad_steps=3", "train.epochs=9"}, "run");
  INFO(result.err);
  CHECK(result.code == 1);
  CHECK_THAT(result.err, Contains("is skipped") && Contains("first bad value is in rank ") && Contains("3 steps in a row were not finite"));
  CHECK(result.err.find("3 steps in a row") == result.err.rfind("3 steps in a row"));
  CHECK_THAT(result.err, !Contains("another rank"));
}

TEST_CASE("ranks: a signal stops all after one step, and any number of ranks goes on", "[ranks]") {
  if (!has_mpirun()) return;
  RankRun run;
  run.batch = 24;  // which 1, 2, 3 and 4 divide
  const Args sets = with(kRandom, {"train.epochs=40"});
  REQUIRE(run.train_on(1, sets, "straight").code == 0);
  const auto stopped = run.start_on(4, sets, "on4");
  REQUIRE(stopped->wait_for("epoch 2/40"));
  stopped->send(SIGUSR1);  // mpirun passes it on to the ranks
  const ProcessResult result = stopped->finish();
  INFO(result.err);
  CHECK(result.code == 75);
  CHECK_THAT(result.err, Contains("stopped by signal 10 after step"));
  for (const int n : {2, 3}) {
    CAPTURE(n);
    const std::string name = mesa::concat("on", n);
    fs::copy(run.path("on4"), run.path(name), fs::copy_options::recursive);
    const ProcessResult rest = run.train_on(n, sets, name, {"--resume"});
    INFO(rest.err);
    REQUIRE(rest.code == 0);
    check_close(run.metrics("straight"), run.metrics(name), 1e-5);
  }
}

TEST_CASE("ranks: with batches of another size a run goes on, and says how many images it sees twice", "[ranks]") {
  if (!has_mpirun()) return;
  RankRun run;
  REQUIRE(run.train_on(4, {"train.steps=5"}, "run").code == 0);
  run.batch = 18;
  const ProcessResult rest = run.train_on(3, {}, "run", {"--resume"});
  INFO(rest.err);
  CHECK(rest.code == 0);
  CHECK_THAT(rest.err, Contains("batches of 18 images in place of 16: 8 images of this epoch are seen twice"));
  CHECK(run.json("run/summary.json")["epochs"] == 2);
}

TEST_CASE("ranks: an error on one of them is told once, with its rank", "[ranks]") {
  if (!has_mpirun()) return;
  const RankRun run;
  const std::string train = std::string(MESA_BIN_DIR) + "/mesa-train --config tiny.yaml --output out --set train.batch_size=8 ";
  const Args script{"-c", "exec " + train + "--set seed=$OMPI_COMM_WORLD_RANK"};
  Args args{"mpirun"};
  for (std::string& arg : mpirun_args(2)) args.push_back(std::move(arg));
  args.insert(args.end(), {"/bin/bash", script[0], script[1]});
  const ProcessResult result = mesa::testing::run("/usr/bin/env", args, mpirun_environment(), run.path("."));
  INFO(result.err);
  CHECK(result.code != 0);
  CHECK_THAT(result.err, Contains("ranks 0 and 1 differ in config: 'seed: 0' and 'seed: 1'"));
  CHECK(result.err.find("differ in config") == result.err.rfind("differ in config"));
  CHECK_FALSE(run.exists("out/checkpoints"));
}

TEST_CASE("ranks: --check-comm tells who is there and how fast they add up", "[ranks]") {
  if (!has_mpirun()) return;
  const RankRun run;
  const ProcessResult result = mpirun(2, "mesa-train", {"--config", "tiny.yaml", "--check-comm"}, {}, run.path("."));
  INFO(result.err << result.out);
  CHECK(result.code == 0);
  for (const char* text : {"rank 0: host ", "rank 1: host ", "local rank 1", " threads, mesa ", " (commit ", "), config ",
                           "sum of 64 MB over 2 ranks: ", "GB/s", "all 2 ranks are there"})
    CHECK_THAT(result.out, Contains(text));
  CHECK(run.call("mesa-train", {"--config", "tiny.yaml", "--check-comm"}).code == 0);  // one alone
}
