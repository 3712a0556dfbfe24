// Several processes as ranks: collectives through MPI, and what happens when one of them dies, stops or fails.
#include <signal.h>
#include <sys/socket.h>

#include <catch2/catch.hpp>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <optional>
#include <thread>

#include "mesa/dist/world.h"
#include "support/collectives.h"
#include "support/mpirun.h"
#include "support/process.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

/// One of several processes that were started with the variables of torchrun.
std::unique_ptr<Process> start_rank(int rank, int world, int port, int timeout = 10) {
  return std::make_unique<Process>("mesa-tests", std::vector<std::string>{"rank: waits"},
                                   Environment{{"RANK", std::to_string(rank)},
                                               {"WORLD_SIZE", std::to_string(world)},
                                               {"MASTER_ADDR", "127.0.0.1"},
                                               {"MASTER_PORT", std::to_string(port)},
                                               {"MESA_RANK_TIMEOUT", std::to_string(timeout)}});
}

/// False where a filter took in what only the tests below start.
bool is_a_rank() { return std::getenv("WORLD_SIZE") != nullptr || std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr; }

int free_port() { return Listener().port(); }

struct Ranks {
  std::deque<std::unique_ptr<Process>> all;
  explicit Ranks(int world, int timeout = 10) {
    const int port = free_port();
    for (int r = 0; r < world; ++r) all.push_back(start_rank(r, world, port, timeout));
    for (auto& rank : all) REQUIRE(rank->wait_for("stands at step"));
    std::this_thread::sleep_for(std::chrono::seconds(2));  // until the others know
  }
  Process& operator[](int rank) { return *all[static_cast<size_t>(rank)]; }
};

}  // namespace

// ---- what the ranks run ---------------------------------------------------------------------------------------------------------

TEST_CASE("rank: collectives", "[.rank]") {
  if (!is_a_rank()) return;
  World world(30);
  Communicator& comm = world.communicator(kCpu);
  for (const int64_t count : {1, 17, 100'003}) {
    check_collectives<float>(comm, DType::f32, count);
    check_collectives<double>(comm, DType::f64, count);
    check_collectives<int64_t>(comm, DType::i64, count);
    check_bf16(comm, count);
  }
  comm.barrier();
  const std::vector<std::string> texts = world.control()->exchange("texts", concat("text of ", comm.rank(), std::string(5000, 'x')));
  REQUIRE(static_cast<int64_t>(texts.size()) == comm.size());
  for (int64_t r = 0; r < comm.size(); ++r) CHECK(texts[static_cast<size_t>(r)] == concat("text of ", r, std::string(5000, 'x')));
  std::fprintf(stderr, "rank %ld of %ld (local %ld) is done\n", comm.rank(), comm.size(), world.me().local_rank);
}

TEST_CASE("rank: waits", "[.rank]") {
  if (!is_a_rank()) return;
  std::optional<World> there;
  try {
    World& world = there.emplace(8);
    world.control()->exchange("greetings", "here");
    world.control()->at_step(12);
    std::fprintf(stderr, "rank %ld stands at step 12\n", world.me().rank);
    const char* role = std::getenv("MESA_TEST_RANK_FAILS");
    if (role != nullptr && std::stol(role) == world.me().rank) {
      std::this_thread::sleep_for(std::chrono::seconds(1));  // until the others stand there, too
      world.control()->report("has had enough");
      std::_Exit(1);
    }
    const char* stuck = std::getenv("MESA_TEST_RANK_STUCK");
    if (stuck != nullptr && std::stol(stuck) != world.me().rank) world.control()->at_collective(7, true);
    const char* late = std::getenv("MESA_TEST_RANK_LATE");
    if (late != nullptr) {
      const bool is_late = std::stol(late) == world.me().rank;
      if (is_late) {
        const Control::Busy busy(*world.control());
        std::this_thread::sleep_for(std::chrono::seconds(13));  // longer than the timeout, and allowed
        std::fprintf(stderr, "rank %ld was busy\n", world.me().rank);
      } else {
        world.control()->at_collective(7, true);
      }
    }
    for (int i = 0; i < 600; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      world.control()->throw_if_failed();
    }
  } catch (const RankFailure& e) {
    std::fprintf(stderr, "seen: %s\n", e.what());
    if (there && there->control()->speaks()) std::fprintf(stderr, "and told\n");
    std::_Exit(e.exit_code());
  } catch (const Error& e) {
    std::fprintf(stderr, "refused: %s\n", e.what());
    std::_Exit(1);
  }
}

// ---- the tests ------------------------------------------------------------------------------------------------------------------

TEST_CASE("ranks: collectives of 2, 3 and 4 ranks through MPI", "[ranks]") {
  if (!has_mpirun()) return;
  for (const int n : {2, 3, 4}) {
    const ProcessResult result = mpirun(n, "mesa-tests", {"rank: collectives"});
    INFO(result.out << result.err);
    CHECK(result.code == 0);
    for (int r = 0; r < n; ++r) CHECK_THAT(result.err, Contains(concat("rank ", r, " of ", n, " (local ", r, ") is done")));
  }
}

TEST_CASE("ranks: one that dies takes the others down, with its name", "[ranks]") {
  for (const int victim : {1, 0}) {
    CAPTURE(victim);
    Ranks ranks(3);
    ranks[victim].send(SIGKILL);
    for (int r = 0; r < 3; ++r) {
      const ProcessResult result = ranks[r].finish(std::chrono::seconds(40));
      CAPTURE(r, result.err);
      CHECK_FALSE(result.timed_out);
      CHECK(result.code == (r == victim ? 128 + SIGKILL : kExitRankLost));
      if (r != victim) CHECK_THAT(result.err, Contains(concat("seen: rank ", victim, " (")) && Contains("died, last heard of at step 12"));
    }
  }
}

TEST_CASE("ranks: one that stops answering takes the others down, with its name", "[ranks]") {
  for (const int victim : {2, 0}) {
    CAPTURE(victim);
    Ranks ranks(3);
    ranks[victim].send(SIGSTOP);
    for (int r = 0; r < 3; ++r) {
      if (r == victim) continue;
      const ProcessResult result = ranks[r].finish(std::chrono::seconds(40));
      CAPTURE(r, result.err);
      CHECK(result.code == kExitRankLost);
      CHECK_THAT(result.err, Contains(concat("seen: rank ", victim, " (")) && Contains("has not answered for") && Contains("step 12"));
    }
    ranks[victim].send(SIGCONT);  // what was taken for dead hears of it
    CHECK(ranks[victim].finish(std::chrono::seconds(40)).code == kExitRankLost);
  }
}

TEST_CASE("ranks: an error of one is the end of all", "[ranks]") {
  setenv("MESA_TEST_RANK_FAILS", "1", 1);
  Ranks ranks(3);
  unsetenv("MESA_TEST_RANK_FAILS");
  CHECK(ranks[1].finish(std::chrono::seconds(40)).code == 1);
  for (const int r : {0, 2}) {
    const ProcessResult result = ranks[r].finish(std::chrono::seconds(40));
    CHECK(result.code == 1);  // it is not lost: to try again would not help
    CHECK_THAT(result.err, Contains("seen: rank 1 (") && Contains(") failed at step 12, collective 0: has had enough"));
    CHECK((result.err.find("and told") != std::string::npos) == (r == 0));
  }
}

TEST_CASE("ranks: one alone tells of a rank that is there but does not come to a collective, also where it is the leader",
          "[ranks][slow]") {
  for (const char* stuck : {"0", "1"}) {
    setenv("MESA_TEST_RANK_STUCK", stuck, 1);
    Ranks ranks(3, 8);
    unsetenv("MESA_TEST_RANK_STUCK");
    for (int r = 0; r < 3; ++r) {
      const ProcessResult result = ranks[r].finish(std::chrono::seconds(40));
      CAPTURE(stuck, r, result.err);
      CHECK(result.code == kExitRankLost);
      CHECK_THAT(result.err, Contains(concat("seen: rank ", stuck, " (")) && Contains("has not come to collective 7, in which rank "));
      const size_t waited = result.err.find("has waited for ");  // 6 of the 8 in which all is to end; a busy machine may be late
      REQUIRE(waited != std::string::npos);
      const int seconds = std::stoi(result.err.substr(waited + 15));
      CHECK((seconds >= 6 && seconds < 16));
      CHECK((result.err.find("and told") != std::string::npos) == (r == 0));
    }
  }
}

TEST_CASE("ranks: one may be busy, but not keep the others waiting in a collective for ever", "[ranks][slow]") {
  setenv("MESA_TEST_RANK_LATE", "1", 1);
  Ranks ranks(3);
  unsetenv("MESA_TEST_RANK_LATE");
  CHECK(ranks[1].wait_for("rank 1 was busy", std::chrono::seconds(40)));
  for (int r = 0; r < 3; ++r) {
    const ProcessResult result = ranks[r].finish(std::chrono::seconds(40));
    CAPTURE(r, result.err);
    CHECK(result.code == kExitRankLost);
    CHECK_THAT(result.err, Contains("seen: rank 1 (") && Contains("has not come to collective 7, in which rank "));
  }
}

TEST_CASE("ranks: those that do not come are named, and a stranger is sent away", "[ranks]") {
  const int port = free_port();
  const auto zero = start_rank(0, 4, port), two = start_rank(2, 4, port);
  Process stranger("/bin/bash", {"-c", concat("for i in {1..50}; do exec 3<>/dev/tcp/127.0.0.1/", port,
                                              " && break; sleep 0.1; done; echo 'GET / HTTP/1.1' >&3; cat <&3")});
  const ProcessResult result = zero->finish(std::chrono::seconds(40));
  CHECK(result.code == kExitRankLost);
  CHECK_THAT(result.err, Contains("seen: of 4 ranks these did not come") && Contains("within 10 seconds: 1, 3"));
  const ProcessResult joined = two->finish(std::chrono::seconds(20));
  CHECK_FALSE(joined.timed_out);
  CHECK(joined.code == kExitRankLost);
  CHECK_THAT(joined.err, Contains("these did not come"));
}

TEST_CASE("ranks: another run's rank 0 refuses who comes with a wrong key") {
  const Listener listener;
  const std::string own = listener.address(), port = std::to_string(listener.port());
  REQUIRE(own.find(":" + port + "/" + listener.key()) != std::string::npos);
  std::string refused;
  std::thread joins([&] {
    try {
      Control(RankInfo{1, 2, 0, "b"}, "127.0.0.1:" + port + "/0815", 20);
    } catch (const Error& e) {
      refused = e.what();
    }
  });
  CHECK_THROWS_WITH(Control(RankInfo{0, 2, 0, "a"}, listener, 2), Contains("did not come to rank 0") && Contains("within 2 seconds: 1"));
  joins.join();
  CHECK_THAT(refused, Contains("rank 1 (b) cannot reach rank 0 at 127.0.0.1:" + port + ": 127.0.0.1:" + port + " does not take it in"));
  std::thread comes([&] { Control(RankInfo{1, 2, 0, "b"}, "127.0.0.9:" + port + "/" + listener.key(), 20); });
  CHECK_NOTHROW(Control(RankInfo{0, 2, 0, "a"}, listener, 20));
  comes.join();
}

TEST_CASE("ranks: one alone has its collectives for nothing", "[ranks]") {
  const auto alone = single_communicator();
  CHECK(alone->size() == 1);
  check_collectives<float>(*alone, DType::f32, 17);
  check_collectives<int64_t>(*alone, DType::i64, 3);
  alone->barrier();
}

TEST_CASE("ranks: wrong variables are refused with their name", "[ranks]") {
  const auto start = [](Environment env) { return run("mesa-tests", {"rank: waits"}, env); };
  CHECK_THAT(start({{"RANK", "3"}, {"WORLD_SIZE", "2"}}).err, Contains("RANK is 3 and WORLD_SIZE 2"));
  CHECK_THAT(start({{"RANK", "x"}, {"WORLD_SIZE", "2"}}).err, Contains("RANK is 'x'"));
  CHECK_THAT(start({{"RANK", "0"}, {"WORLD_SIZE", "2"}}).err, Contains("MASTER_ADDR"));
  CHECK_THAT(start({{"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "127.0.0.1"}}).err, Contains("MASTER_PORT"));
}
