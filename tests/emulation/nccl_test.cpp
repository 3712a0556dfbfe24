// Ranks on emulated GPUs: the plugin for NCCL on a stand-in, as several processes that know of each other by their environment.
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <deque>
#include <thread>

#include "apps/tiny_run.h"
#include "mesa/dist/world.h"
#include "mesa/kernels/elementwise.h"
#include "support/collectives.h"
#include "support/process.h"

using namespace mesa::testing;
using Catch::Matchers::Contains;
using mesa::concat;

namespace {

/// What each rank gets besides; by rank.
using Wishes = std::map<int, Environment>;

/// Processes that a launcher started as ranks, on a machine with a GPU for each.
class Ranks {
 public:
  Ranks(int world, const std::string& program, const Args& args, const Wishes& wishes = {}, const std::string& folder = ".") {
    const int port = mesa::Listener().port();
    for (int r = 0; r < world; ++r) {
      Environment env{{"RANK", std::to_string(r)},
                      {"LOCAL_RANK", std::to_string(r)},
                      {"WORLD_SIZE", std::to_string(world)},
                      {"MASTER_ADDR", "127.0.0.1"},
                      {"MASTER_PORT", std::to_string(port)},
                      {"MESA_RANK_TIMEOUT", "8"},
                      {"MESA_EMULATION_GPUS", std::to_string(world)}};
      if (const auto more = wishes.find(r); more != wishes.end())
        for (const auto& [name, value] : more->second) env[name] = value;
      all_.push_back(std::make_unique<Process>(program, args, env, folder));
    }
  }
  Process& operator[](int rank) { return *all_[static_cast<size_t>(rank)]; }
  std::vector<ProcessResult> finish() {
    std::vector<ProcessResult> results;
    for (const auto& one : all_) results.push_back(one->finish(std::chrono::seconds(90)));
    return results;
  }

 private:
  std::deque<std::unique_ptr<Process>> all_;
};

Environment nccl(const std::string& wish) { return {{"MESA_EMULATION_NCCL", wish}}; }

const Args kSets{"device=cuda", "storage=exact", "model.drop_path=0.2", "data.mixup=0.8", "train.clip_norm=1e-2", "train.threads=1"};

struct GpuRun : TinyRun {
  Args args(const Args& more, int ranks, const std::string& output) const {
    Args sets = kSets;
    sets.push_back(concat("train.batch_size=", 16 / ranks / 2 * 2));
    sets.insert(sets.end(), more.begin(), more.end());
    return train_args(sets, output);
  }
  ProcessResult alone(const std::string& output) const {
    return mesa::testing::run("mesa-train-emulated", args({}, 1, output), {}, path("."));
  }
  std::vector<ProcessResult> train_on(int ranks, const Args& sets, const std::string& output, const Wishes& wishes = {}) const {
    return start(ranks, sets, output, wishes).finish();
  }
  Ranks start(int ranks, const Args& sets, const std::string& output, const Wishes& wishes = {}) const {
    return Ranks(ranks, "mesa-train-emulated", args(sets, ranks, output), wishes, path("."));
  }
};

/// False where a filter took in what only the tests below start.
bool is_a_rank() { return std::getenv("WORLD_SIZE") != nullptr; }

}  // namespace

// ---- what the ranks run ---------------------------------------------------------------------------------------------------------

TEST_CASE("rank: collectives through NCCL", "[.rank]") {
  if (!is_a_rank()) return;
  mesa::World world(30);
  mesa::Communicator& comm = world.communicator(mesa::kCuda);
  const mesa::Tensor used = mesa::Tensor::zeros({1000}, mesa::DType::f32, mesa::kCuda);
  comm.will_use(used);
  for (const int64_t count : {1, 17, 10'003}) {
    check_collectives<float>(comm, mesa::DType::f32, count);
    check_collectives<double>(comm, mesa::DType::f64, count);
    check_collectives<int64_t>(comm, mesa::DType::i64, count);
    check_bf16(comm, count);
  }
  // Nobody waits on the host: what kernels wrote before is added up, and kernels see the sums after.
  for (int i = 1; i <= 3; ++i) {
    mesa::kernels::fill(used, i);
    comm.all_reduce(used);
    comm.finish();
    mesa::kernels::scale(used, 2, used);
    CHECK(used.to_vector<double>()[999] == 2.0 * i * static_cast<double>(comm.size()));
  }
  comm.barrier();
  CHECK_THROWS_WITH(comm.all_reduce(mesa::Tensor::zeros({4}, mesa::DType::f32)), Contains("contiguous tensors on a GPU"));
  const char* gpu = std::getenv("CUDA_VISIBLE_DEVICES");
  std::fprintf(stderr, "rank %ld of %ld on GPU %s is done\n", comm.rank(), comm.size(), gpu != nullptr ? gpu : "?");
}

TEST_CASE("rank: waits for NCCL", "[.rank]") {
  if (!is_a_rank()) return;
  try {
    mesa::World world(8);
    if (std::getenv("MESA_TEST_STAYS_AWAY") != nullptr) {
      world.control()->exchange("the id of NCCL", "");
      for (;; usleep(50'000)) world.control()->throw_if_failed();
    }
    world.communicator(mesa::kCuda);
  } catch (const mesa::RankFailure& e) {
    std::fprintf(stderr, "seen: %s\n", e.what());
    std::_Exit(mesa::kExitRankLost);
  }
}

// ---- the tests ------------------------------------------------------------------------------------------------------------------

TEST_CASE("NCCL: collectives of 1, 2 and 3 ranks, each on a GPU of its own", "[ranks]") {
  for (const int n : {1, 2, 3}) {
    const auto results = Ranks(n, "mesa-tests-emulated", {"rank: collectives through NCCL"}).finish();
    for (int r = 0; r < n; ++r) {
      const ProcessResult& result = results[static_cast<size_t>(r)];
      INFO(result.out << result.err);
      CHECK(result.code == 0);
      CHECK_THAT(result.err, Contains(concat("rank ", r, " of ", n, " on GPU ", r, " is done")));
    }
  }
}

TEST_CASE("NCCL: training on 2 ranks has the curve of 1, also with a shared optimizer and recorded passes", "[ranks]") {
  const GpuRun run;
  const auto check_all = [](const std::vector<ProcessResult>& results) {
    for (const ProcessResult& result : results) {
      INFO(result.err);
      REQUIRE(result.code == 0);
    }
  };
  check_all({run.alone("alone")});
  const auto expected = run.metrics("alone");
  REQUIRE(expected.size() == 12);
  check_all(run.train_on(1, {}, "one"));
  CHECK(run.metrics("one") == expected);  // a sum of one is what it was
  CHECK_THAT(read_text(run.path("one/log.txt")), Contains("ranks: 1, 16 images a batch"));
  check_all(run.train_on(1, {"train.shard=optimizer"}, "one-shared"));
  check_close(expected, run.metrics("one-shared"), 1e-5);
  check_all(run.train_on(1, {"device=cpu"}, "cpu"));  // which needs nobody, whatever is set
  check_all(run.train_on(2, {}, "two"));
  check_close(expected, run.metrics("two"), 1e-5);
  check_all(run.train_on(2, {"train.shard=optimizer", "train.cuda_graph=true"}, "shared"));
  check_close(expected, run.metrics("shared"), 1e-5);
  const auto copied = run.train_on(2, {}, "copied", {{1, nccl("refuses_memory")}});
  check_all(copied);
  CHECK_THAT(copied[0].err, Contains("warning: NCCL copies gradients") && Contains("rank 1 cannot register") && Contains("as asked for"));
  CHECK(run.metrics("copied") == run.metrics("two"));
}

TEST_CASE("NCCL: all kinds of collectives have run when a plan takes the GPU's memory", "[ranks]") {
  const GpuRun run;
  for (const char* const shard : {"none", "optimizer"}) {
    const auto results = run.train_on(2, {concat("train.shard=", shard), "train.steps=2"}, shard, {{0, nccl("tells")}});
    for (const ProcessResult& result : results) CHECK(result.code == 0);
    const std::string& said = results[0].err;
    INFO(said);
    int kinds = 0;
    for (size_t at = 0; (at = said.find("a collective of a new kind, ", at)) != std::string::npos; ++kinds)
      CHECK(std::stoi(said.substr(at += 28)) < 32);  // the plan takes 128 MB and more
    CHECK(kinds >= 2);
  }
}

TEST_CASE("NCCL: what ranks are told on a host with fewer GPUs than ranks", "[ranks]") {
  const GpuRun run;
  const auto on_one_gpu = [&](const char* device, Environment env) {
    env["MESA_EMULATION_GPUS"] = "1";
    const Args args{"--config", "tiny.yaml", "--check-comm", "--device", device};
    return Ranks(2, "mesa-train-emulated", args, {{0, env}, {1, env}}, run.path(".")).finish();
  };
  CHECK_THAT(on_one_gpu("cpu", {})[0].err, Contains("the CPU engine's ranks talk through MPI"));
  CHECK_THAT(on_one_gpu("auto", {{"CUDA_VISIBLE_DEVICES", ""}})[0].err, Contains("the CPU engine's ranks talk through MPI"));
  CHECK_THAT(on_one_gpu("auto", {})[0].err, Contains("ranks 0 and 1 differ in device"));
  const auto too_few = on_one_gpu("cuda", {});
  CHECK_THAT(concat(too_few[0].err, too_few[1].err), Contains("rank 1 (") && Contains("no NVIDIA GPU was found") && Contains("is '1'"));
}

TEST_CASE("NCCL: a set-up that does not end is ended, with the name of who is missing", "[ranks][slow]") {
  Ranks missing(3, "mesa-tests-emulated", {"rank: waits for NCCL"}, {{1, {{"MESA_TEST_STAYS_AWAY", "1"}}}});
  const GpuRun run;
  Ranks nobody = run.start(2, {}, "nobody", {{1, nccl("never_connects")}});
  Ranks same_gpu = run.start(2, {}, "same", {{0, {{"CUDA_VISIBLE_DEVICES", "0"}}}, {1, {{"CUDA_VISIBLE_DEVICES", "0"}}}});
  for (const ProcessResult& result : missing.finish()) {
    INFO(result.err);
    CHECK(result.code == mesa::kExitRankLost);
    CHECK_THAT(result.err, Contains("seen: rank 1 (") && Contains("has not come to collective 1, in which rank "));
  }
  const auto unconnected = nobody.finish();
  for (const ProcessResult& result : unconnected) CHECK(result.code == mesa::kExitRankLost);
  CHECK_THAT(unconnected[0].err, Contains("error: all ranks are in collective 1 and it does not end") && Contains("NCCL_SOCKET_IFNAME"));
  const auto refused = same_gpu.finish();
  for (const ProcessResult& result : refused) {
    INFO(result.err);
    CHECK(result.code == 1);
  }
  CHECK_THAT(refused[0].err, Contains("invalid usage: emulated: two ranks use the GPU 0"));
}

TEST_CASE("NCCL: a rank that dies ends the others, which say its name and not NCCL's", "[ranks]") {
  const GpuRun run;
  for (const int victim : {2, 0}) {
    CAPTURE(victim);
    const std::string output = concat("without", victim);
    // Memory of a recorded step is freed as the run ends, which waits for all that the GPU still has to do.
    Ranks ranks = run.start(3, {"train.epochs=100000", "train.cuda_graph=true"}, output);
    REQUIRE(ranks[0].wait_for("epoch 2/"));
    ranks[victim].send(SIGKILL);
    const auto results = ranks.finish();
    for (int r = 0; r < 3; ++r) {
      INFO(results[static_cast<size_t>(r)].err);
      CHECK(results[static_cast<size_t>(r)].code == (r == victim ? 128 + SIGKILL : mesa::kExitRankLost));
    }
    const std::string told = results[victim == 0 ? 1 : 0].err;
    CHECK_THAT(told, Contains(concat("error: rank ", victim, " (")) && Contains("died, last heard of at step") && !Contains("nccl:"));
    if (victim == 0) CHECK_THAT(read_text(run.path(output + "/errors.txt")), Contains("rank 1 (") && Contains(": rank 0 ("));
  }
}

TEST_CASE("NCCL: its errors name the rank that is to blame", "[ranks][slow]") {
  const GpuRun run;
  const Args sets{"train.epochs=100000"};
  Ranks silent = run.start(2, sets, "silent", {{1, nccl("loses_network@40")}});
  Ranks internal = run.start(2, sets, "internal", {{1, nccl("internal_error@40")}});
  // Long enough that the wire's word is awaited before the collective counts as stuck.
  const Environment patient{{"MESA_RANK_TIMEOUT", "20"}};
  Environment failing = nccl("remote_error@40");
  failing.insert(patient.begin(), patient.end());
  Ranks remote = run.start(2, sets, "remote", {{0, patient}, {1, failing}});

  const ProcessResult left = silent[0].finish(std::chrono::seconds(60));  // NCCL tells it at once, and the wire in 4 seconds
  INFO(left.err);
  CHECK(left.code == mesa::kExitRankLost);
  CHECK_THAT(left.err, Contains("error: rank 1 (") && Contains("has not answered for") && !Contains("nccl:"));
  const auto own = internal.finish();
  INFO(own[0].err);
  for (const ProcessResult& result : own) CHECK(result.code == 1);
  CHECK_THAT(own[0].err, Contains("error: rank 1 (") && Contains(" failed at step ") && Contains(": nccl: a collective: ") &&
                             Contains("internal error: emulated: as asked for"));
  const auto nobody = remote.finish();
  INFO(nobody[0].err);
  for (const ProcessResult& result : nobody) CHECK(result.code == mesa::kExitRankLost);
  CHECK_THAT(nobody[0].err, Contains("error: rank 1 (") && Contains("has lost another rank: nccl: ") && Contains("as asked for"));
}
