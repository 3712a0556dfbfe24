// A rank that is killed or stopped at a random moment ends the run on all ranks, soon and with one message, and the run goes on from its
// checkpoint: again and again, until it has come where a run came that lost nobody.
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <random>
#include <thread>

#include "apps/cut_off.h"
#include "apps/rank_run.h"
#include "mesa/dist/control.h"

using namespace mesa::testing;
using Catch::Matchers::Contains;
using Clock = std::chrono::steady_clock;
namespace fs = std::filesystem;

namespace {

constexpr int kRanks = 3;
// Half of it, the silence of a rank that counts as lost, is many times what a busy machine keeps a process waiting.
constexpr int kTimeout = 12;
constexpr auto kSoon = std::chrono::seconds(60);  // as docs/distributed.md promises of timeouts no longer than the default one
#ifdef __SANITIZE_ADDRESS__
constexpr int kRounds = 4;
constexpr int64_t kSteps = 150;
#else
constexpr int kRounds = 50;
constexpr int64_t kSteps = 400;
#endif

const Args kSets{mesa::concat("train.steps=", kSteps),
                 "train.epochs=100000",
                 "schedule.name=constant",
                 "storage=mesa",
                 "train.ema_decay=0.9",
                 "model.drop_rate=0.1"};
const Args kSaving{"train.checkpoint_interval=2", "train.keep=2"};

size_t count(const std::string& text, const std::string& part) {
  size_t n = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

enum class Moment { start, step, save };
const char* const kMoments[] = {"as the run starts", "after a step", "while a checkpoint is written"};

/// One run that loses a rank, resumes, loses another one, ...
class LosingRun {
 public:
  LosingRun(const RankRun& tiny, int signal, int number, std::mt19937_64& random)
      : tiny_(tiny),
        signal_(signal),
        random_(random),
        name_(mesa::concat(signal == SIGKILL ? "killed" : "stopped", number, "of", getpid())) {}
  const std::string& name() const { return name_; }
  int64_t reached() const { return reached_; }
  int rounds() const { return rounds_; }
  Moment moment() const { return moment_; }
  bool struck() const { return struck_; }

  void start() {
    moment_ = rounds_ == 0 ? Moment::start : static_cast<Moment>(random_() % 3);  // the first before there is a checkpoint
    moves_ = moment_ == Moment::start ? 1 : 1 + static_cast<int>(random_() % 8);
    pause_ = std::chrono::microseconds(rounds_ == 0 ? 0 : random_() % 20'000);
    victim_ = random_() % kRanks;
    pids_.clear();
    struck_ = came_ = false;
    changes_ = 0;
    size_ = watched_size();
    process_ = tiny_.start_on(kRanks, with(kSets, kSaving), name_, {"--resume", "--quiet"});
  }

  /// Sends the signal if it is time.
  void strike_if_time() {
    if (struck_) return;
    if (pids_.empty()) pids_ = ranks_of(name_);
    if (pids_.size() < kRanks) return pids_.clear();
    const bool over = kill(pids_[0], 0) != 0;
    if (!came_ && !over) {
      if (!has_come()) return;
      came_ = true;
      at_ = Clock::now() + pause_;
    }
    if (Clock::now() < at_ && !over) return;
    at_ = Clock::now();
    kill(pids_[victim_], signal_);
    struck_ = true;
  }

  void wait_for_end() {
    result_ = process_->finish(kSoon);
    ended_ = Clock::now();
  }

  /// False if the run came to its end before the signal did.
  bool check_loss(const std::map<int64_t, Json>& straight) {
    CAPTURE(name_, rounds_, victim_, kMoments[static_cast<int>(moment_)]);
    INFO(result_.err);
    CHECK_FALSE(result_.timed_out);
    CHECK(ended_ - at_ < kSoon);
    for (int wait = 0; wait < 200 && !ranks_of(name_).empty(); ++wait) std::this_thread::sleep_for(std::chrono::milliseconds(100));
    CHECK(ranks_of(name_).empty());
    if (result_.code == 0) return false;
    check_words();
    CHECK_THAT(result_.err, !Contains("cannot be used"));  // the checkpoint that the round before has left
    reached_ = check_left(tiny_, name_, straight, reached_);
    ++rounds_;
    return true;
  }

 private:
  /// Of the file that shows how far the run is.
  uintmax_t watched_size() const {
    std::error_code absent;
    const uintmax_t size = fs::file_size(tiny_.path(name_ + (moment_ == Moment::start ? "/log.txt" : "/metrics.jsonl")), absent);
    return absent ? 0 : size;
  }

  /// Ranks know of each other from the moment when they write to the run's folder. Before it mpirun stands in their place, which may wait
  /// for ever if a process dies while the two shake hands (4.1.4: "PMIX ERROR: UNREACHABLE", once in 62 kills).
  bool has_come() {
    const uintmax_t size = watched_size();
    if (size != size_) ++changes_;
    size_ = size;
    if (changes_ < moves_) return false;
    if (moment_ != Moment::save) return true;
    std::error_code absent;
    for (const auto& entry : fs::directory_iterator(tiny_.path(name_ + "/checkpoints"), absent))
      if (entry.path().extension() == ".tmp") return true;
    return false;
  }

  void check_words() const {
    const std::string lost = mesa::concat("rank ", victim_, " (");
    if (signal_ == SIGSTOP) {
      CHECK(result_.code == mesa::kExitRankLost);
      CHECK_THAT(result_.err,
                 Contains(lost) && Contains("has not answered for") && Contains("last heard of at step") && Contains("collective"));
      CHECK(count(result_.err, lost) == 1);
    } else {  // mpirun may be quicker
      CHECK((result_.code == 128 + SIGKILL || result_.code == mesa::kExitRankLost));
      CHECK_THAT(result_.err, Contains(lost) || Contains(mesa::concat("process rank ", victim_, " with PID")));
      CHECK(count(result_.err, lost) <= 1);
    }
    CHECK(count(result_.err, "last heard of") <= 1);
    if (victim_ == 0 && signal_ == SIGSTOP) CHECK_THAT(read_text(tiny_.path(name_ + "/errors.txt")), Contains(lost));
  }

  const RankRun& tiny_;
  const int signal_;
  std::mt19937_64& random_;
  const std::string name_;
  std::unique_ptr<Process> process_;
  ProcessResult result_;
  Moment moment_ = Moment::start;
  int rounds_ = 0, moves_ = 0, changes_ = 0;
  size_t victim_ = 0;
  std::chrono::microseconds pause_{0};
  std::vector<pid_t> pids_;
  uintmax_t size_ = 0;
  bool struck_ = false, came_ = false;
  Clock::time_point at_, ended_;
  int64_t reached_ = 0;  // the step of the checkpoint that is left
};

/// `together` runs at a time, most of which wait for silent ranks.
void lose_ranks(int signal, int together) {
  const int wanted = static_cast<int>(wish("MESA_TEST_LOST_RANKS", kRounds));
  const uint64_t seed = test_seed();
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  RankRun tiny;
  tiny.timeout = kTimeout;
  REQUIRE(tiny.train_on(kRanks, kSets, "straight").code == 0);
  const auto straight = curve_so_far(tiny, "straight");
  REQUIRE(straight.size() == kSteps);

  int begun = 0, lost = 0, resumable = 0, at[3] = {};
  const auto check_end = [&](const std::string& run) {
    const ProcessResult result = tiny.train_on(kRanks, kSets, run, {"--resume"});
    INFO(result.err);
    REQUIRE(result.code == 0);
    CHECK((curve_so_far(tiny, run) == straight));  // in parentheses, lest all lines be printed
    CHECK(tiny.weights(run) == tiny.weights("straight"));
  };
  const int rounds_of_run = std::clamp(wanted / together, 2, 10);
  std::vector<std::unique_ptr<LosingRun>> runs(static_cast<size_t>(together));
  while (lost < wanted) {
    for (auto& run : runs) {
      if (!run) run = std::make_unique<LosingRun>(tiny, signal, begun++, random);
      run->start();
    }
    const auto limit = Clock::now() + std::chrono::seconds(120);
    const auto ready = [&](const auto& run) { return run->struck() || Clock::now() > limit; };
    for (bool all = false; !all; std::this_thread::sleep_for(std::chrono::microseconds(200))) {
      for (auto& run : runs) run->strike_if_time();
      all = std::all_of(runs.begin(), runs.end(), ready);
    }
    for (auto& run : runs) run->wait_for_end();
    for (auto& run : runs) {
      const bool was_lost = run->check_loss(straight);
      if (was_lost) ++lost, ++at[static_cast<int>(run->moment())], resumable += run->reached() > 0;
      if (was_lost && run->rounds() < rounds_of_run && lost < wanted) continue;
      check_end(run->name());
      run.reset();
    }
  }
  for (auto& run : runs)
    if (run && run->rounds() > 0) check_end(run->name());
  WARN("seed " << seed << ": " << lost << " ranks lost (" << at[0] << " " << kMoments[0] << ", " << at[1] << " " << kMoments[1] << ", "
               << at[2] << " " << kMoments[2] << "), " << resumable << " times with a checkpoint on the disk; " << begun
               << " runs ended bit for bit as the one that lost nobody");
  CHECK(resumable < lost);
  if (wanted >= 50) CHECK(resumable > lost / 2);
}

}  // namespace

TEST_CASE("ranks: of runs of which ranks are killed, all end soon and resume onto the same curve", "[ranks]") {
  if (has_mpirun()) lose_ranks(SIGKILL, 2);
}

TEST_CASE("ranks: of runs of which ranks are stopped, all end soon and resume onto the same curve", "[ranks][slow]") {
  if (has_mpirun()) lose_ranks(SIGSTOP, 5);
}
