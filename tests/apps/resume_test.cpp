// A run that was stopped and resumed equals one that never stopped, bit for bit.
#include <csignal>
#include <cstring>
#include <random>
#include <thread>

#include "apps/tiny_run.h"
#include "mesa/kernels/matmul.h"

using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

const std::string kAverages = "/checkpoints/last/ema.safetensors";

void check_same(const TinyRun& tiny, const std::string& a, const std::string& b) {
  const auto bytes = [&](const std::string& run, const char* file) { return read_text(tiny.path(run + "/checkpoints/last/" + file)); };
  CHECK(bytes(a, "model.safetensors") == bytes(b, "model.safetensors"));
  CHECK(bytes(a, "state.safetensors") == bytes(b, "state.safetensors"));
  CHECK(tiny.exists(a + kAverages) == tiny.exists(b + kAverages));
  if (tiny.exists(a + kAverages)) CHECK(bytes(a, "ema.safetensors") == bytes(b, "ema.safetensors"));
  CHECK(tiny.curve(a) == tiny.curve(b));
  CHECK(tiny.metrics(a) == tiny.metrics(b));
  for (const char* key : {"top1", "top5", "eval_loss", "train_loss", "epochs", "steps", "activation_bytes_per_image", "peak_bytes"}) {
    CAPTURE(key);
    CHECK(tiny.json(a + "/summary.json")[key] == tiny.json(b + "/summary.json")[key]);
  }
}

const Args kEverything{"data.mixup=0.8",
                       "data.cutmix=1",
                       "train.loss=bce",
                       "storage=mesa",
                       "model.attention=explicit",
                       "model.depth=2",
                       "model.drop_path=0.2",
                       "model.drop_rate=0.1",
                       "model.attn_drop_rate=0.1",
                       "train.accumulation=3",
                       "data.crop=resized",
                       "data.flip=0.5",
                       "data.color_jitter=0.4",
                       "train.clip_norm=1",
                       "train.epochs=3",
                       "train.batch_size=8",
                       "train.log_interval=3",
                       "train.ema_decay=0.9",
                       "optimizer.layer_decay=0.8",
                       "data.repeats=2",
                       "data.augment=rand-m9-mstd0.5-inc1",
                       "data.erasing=0.25"};

const Args kLora{"lora.rank=3", "lora.alpha=8", "lora.dropout=0.2", "lora.targets=[\"*.qkv\", blocks.1.*]",
                 "lora.train=[fc_norm.*, \"*.bias\"]"};

/// The bytes behind the header, whose metadata tell how many loader threads there were.
std::string weights_of(const TinyRun& tiny, const std::string& run, const std::string& file = "model.safetensors") {
  const std::string text = read_text(tiny.path(run + "/checkpoints/last/" + file));
  uint64_t header = 0;
  REQUIRE(text.size() > 8);
  std::memcpy(&header, text.data(), 8);
  return text.substr(8 + header);
}

}  // namespace

TEST_CASE("resume: stopped by signals at random moments") {
  const uint64_t seed = std::random_device{}();
  CAPTURE(seed);
  std::mt19937_64 random(seed);
  const TinyRun tiny;
  Args sets = kEverything;
  const auto [precision, lora] = GENERATE(table<std::string, bool>({{"fp32", false}, {"bf16", false}, {"fp32", true}}));
  CAPTURE(precision, lora);
  if (precision == "bf16" && !mesa::kernels::native_bf16()) return;
  if (lora) sets.insert(sets.end(), kLora.begin(), kLora.end());
  sets.push_back("train.precision=" + precision);
  REQUIRE(tiny.train(sets, "straight").code == 0);
  int stops = 0;
  for (int attempt = 0; attempt < 40; ++attempt) {
    Args now = sets;  // another number of loader threads each time: the order must not depend on it
    now.push_back("data.workers=" + std::to_string(1 + attempt % 3));
    Process process = tiny.start(now, "stopped", {"--resume"});
    // The first stops let at least a step pass, so that the run comes to an end.
    if (attempt < 6) {
      process.wait_for("% ");
      std::this_thread::sleep_for(std::chrono::milliseconds(random() % 12));
      process.send(attempt % 2 ? SIGTERM : SIGINT);
    }
    const ProcessResult result = process.finish();
    INFO(result.err);
    REQUIRE((result.code == 75 || result.code == 0));
    stops += result.code == 75;
    if (result.code == 0) break;
    CHECK_THAT(result.err, Contains("continue with --resume"));
  }
  CHECK(stops > 0);
  CHECK(weights_of(tiny, "straight") == weights_of(tiny, "stopped"));
  CHECK(weights_of(tiny, "straight", "ema.safetensors") == weights_of(tiny, "stopped", "ema.safetensors"));
  const auto state = [&](const std::string& run) { return read_text(tiny.path(run + "/checkpoints/last/state.safetensors")); };
  CHECK(state("straight") == state("stopped"));
  CHECK(tiny.metrics("straight") == tiny.metrics("stopped"));
  CHECK(tiny.curve("straight") == tiny.curve("stopped"));
}

TEST_CASE("resume: killed after a checkpoint within an epoch") {
  const TinyRun tiny;
  Args sets = kEverything;
  sets.push_back("train.checkpoint_interval=2");
  const bool lora = GENERATE(false, true);
  CAPTURE(lora);
  if (lora) sets.insert(sets.end(), kLora.begin(), kLora.end());
  REQUIRE(tiny.train(sets, "straight").code == 0);
  int code = 0;
  for (int tries = 0; tries < 5 && code == 0; ++tries) {  // a busy machine may send the signal when the run is over
    std::filesystem::remove_all(tiny.path("killed"));
    Process process = tiny.start(sets, "killed");
    REQUIRE(process.wait_for("epoch 2/3 "));
    process.send(SIGKILL);
    code = process.finish().code;
  }
  CHECK(code == 128 + SIGKILL);
  REQUIRE(tiny.train(sets, "killed", {"--resume"}).code == 0);
  check_same(tiny, "straight", "killed");
}

TEST_CASE("resume: a limit of steps within an epoch, raised later") {
  const TinyRun tiny;
  Args sets{"schedule.name=constant", "train.epochs=3"};
  REQUIRE(tiny.train(sets, "straight").code == 0);
  Args limited = sets;
  limited.push_back("train.steps=8");
  REQUIRE(tiny.train(limited, "limited").code == 0);
  CHECK(tiny.json("limited/summary.json")["steps"] == 8);
  CHECK(read_csv(tiny.path("limited/summary.csv")).size() == 3);
  SECTION("again with the same limit: finished, nothing changes") {
    const auto rows = read_csv(tiny.path("limited/summary.csv"));
    const ProcessResult again = tiny.train(limited, "limited", {"--resume"});
    CHECK(again.code == 0);
    CHECK_THAT(again.err, Contains("finished already"));
    CHECK(read_csv(tiny.path("limited/summary.csv")) == rows);
  }
  SECTION("without the limit it ends as the straight run") {
    REQUIRE(tiny.train(sets, "limited", {"--resume"}).code == 0);
    check_same(tiny, "straight", "limited");
  }
}

TEST_CASE("resume: with nothing there a fresh run starts, also after a death before the first checkpoint") {
  const TinyRun tiny;
  Process process = tiny.start({"train.epochs=50"}, "run", {"--resume"});
  REQUIRE(process.wait_for("epoch 1/50 "));
  process.send(SIGKILL);
  process.finish();
  std::filesystem::remove_all(tiny.path("run/checkpoints"));
  const ProcessResult again = tiny.train({}, "run", {"--resume"});
  INFO(again.err);
  CHECK(again.code == 0);
  CHECK_THAT(again.err, Contains("a fresh run begins"));
  CHECK(tiny.metrics("run").size() == 12);
}

TEST_CASE("resume: a damaged last checkpoint gives way to the best, none whole is an error") {
  const TinyRun tiny;
  REQUIRE(tiny.train().code == 0);
  const std::string last = tiny.path("run/checkpoints/last/model.safetensors"), best = tiny.path("run/checkpoints/best/model.safetensors");
  const std::string whole = read_text(last);
  SECTION("truncated") { tiny.write("run/checkpoints/last/model.safetensors", whole.substr(0, whole.size() / 2)); }
  SECTION("one bit flipped") {
    std::string bytes = whole;
    bytes[bytes.size() - 100] ^= 4;
    tiny.write("run/checkpoints/last/model.safetensors", bytes);
  }
  SECTION("a file is missing") { std::filesystem::remove(tiny.path("run/checkpoints/last/state.json")); }
  const ProcessResult evaluated = tiny.eval({"run/checkpoints/last"});
  CHECK(evaluated.code == 1);
  CHECK_THAT(evaluated.err, Contains("checkpoints/last"));
  const ProcessResult resumed = tiny.train({}, "run", {"--resume"});
  INFO(resumed.err);
  CHECK(resumed.code == 0);
  CHECK_THAT(resumed.err, Contains("checkpoints/last cannot be used") && Contains("checkpoints/best"));
  CHECK(read_text(last) == whole);

  tiny.write("run/checkpoints/last/model.safetensors", "x"), tiny.write("run/checkpoints/best/model.safetensors", "x");
  const ProcessResult none = tiny.train({}, "run", {"--resume"});
  CHECK(none.code == 1);
  CHECK_THAT(none.err, Contains("no checkpoint of run is whole"));
}

TEST_CASE("resume: another model's checkpoint, another batch size within an epoch") {
  const TinyRun tiny;
  REQUIRE(tiny.train({"schedule.name=constant", "train.steps=8"}).code == 0);
  const ProcessResult model = tiny.train({"model.width=48"}, "other", {"--resume", "run"});
  CHECK(model.code == 1);
  CHECK_THAT(model.err, Contains("another model") && Contains("pos_embed"));
  CHECK_FALSE(tiny.exists("other"));
  const ProcessResult batch = tiny.train({"train.batch_size=8"}, "run", {"--resume"});
  CHECK(batch.code == 2);
  CHECK_THAT(batch.err, Contains("train.batch_size") && Contains("within an epoch"));
  SECTION("a checkpoint continues in a folder of its own") {
    const ProcessResult elsewhere = tiny.train({"schedule.name=constant"}, "other", {"--resume", "run"});
    INFO(elsewhere.err);
    CHECK(elsewhere.code == 0);
    CHECK(tiny.metrics("other").front()["step"] == 9);
    CHECK(tiny.exists("other/memory.csv"));
    CHECK(tiny.train({}, "run", {"--resume", "other"}).code == 1);  // would mix two runs
  }
}

TEST_CASE("signals: two close together are one, a second one leaves at once") {
  const TinyRun tiny;
  Process twice = tiny.start({"train.epochs=5000"}, "twice");
  REQUIRE(twice.wait_for("epoch 1/5000 "));
  twice.send(SIGTERM), twice.send(SIGTERM);
  CHECK(twice.finish().code == 75);
  // A step of minutes, so that the second signal finds the process at work; and long behind the first, as a busy machine delivers them.
  Process process = tiny.start({"train.batch_size=96", "train.accumulation=100000", "train.epochs=1", "data.train_size=2000000"}, "slow");
  REQUIRE(process.wait_for("output: slow"));
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  process.send(SIGINT);
  std::this_thread::sleep_for(std::chrono::seconds(3));
  process.send(SIGINT);
  CHECK(process.finish(std::chrono::seconds(10)).code == 128 + SIGINT);
}

TEST_CASE("signals: during the evaluation the run stops and the resumed one evaluates") {
  const TinyRun tiny;
  const Args sets{"train.epochs=2", "train.eval_batch_size=16"};
  Args slow = sets;
  slow.emplace_back("data.test_size=2000000");  // an evaluation of minutes
  Process process = tiny.start(slow, "stopped");
  REQUIRE(process.wait_for("step 6/6"));
  std::this_thread::sleep_for(std::chrono::milliseconds(60));
  process.send(SIGTERM);
  const ProcessResult stopped = process.finish();
  INFO(stopped.err);
  REQUIRE(stopped.code == 75);
  CHECK(read_csv(tiny.path("stopped/summary.csv")).size() == 1);
  REQUIRE(tiny.train(sets, "stopped", {"--resume"}).code == 0);
  REQUIRE(tiny.train(sets, "straight").code == 0);
  check_same(tiny, "straight", "stopped");
}

TEST_CASE("signals: those of train.stop_signals stop the run, others do what they do to any program") {
  const TinyRun tiny;
  const auto stopped_by = [&](int signal, const std::string& names, const std::string& output) {
    Process process = tiny.start({"train.epochs=50000", "train.stop_signals=" + names}, output);
    REQUIRE(process.wait_for("step 6/6"));
    process.send(signal);
    return process.finish(std::chrono::seconds(60)).code;
  };
  CHECK(stopped_by(SIGUSR2, "[SIGUSR2, SIGXCPU]", "usr2") == 75);
  CHECK(stopped_by(SIGXCPU, "[SIGUSR2, SIGXCPU]", "xcpu") == 75);
  CHECK(stopped_by(SIGTERM, "[SIGUSR2]", "term") == 128 + SIGTERM);
  CHECK(stopped_by(SIGUSR1, "[]", "none") == 128 + SIGUSR1);
  CHECK(tiny.train({"train.stop_signals=[SIGUSR2]"}, "usr2", {"--resume"}).code == 0);  // may change, as the number of epochs may
  const ProcessResult wrong = tiny.train({"train.stop_signals=[SIGTERM, SIGURS1]"});
  CHECK(wrong.code == 2);
  CHECK_THAT(wrong.err, Contains("train.stop_signals") && Contains("SIGURS1") && Contains("did you mean 'SIGUSR1'"));
}

TEST_CASE("signals: in the set-up, before the first step, and while the learning rate warms up") {
  const TinyRun tiny;
  const Args sets{"schedule.warmup_epochs=40", "train.epochs=50", "data.train_size=9600"};
  Process early = tiny.start(sets, "early");
  REQUIRE(early.wait_for("output: early"));
  early.send(SIGUSR1);
  const ProcessResult first = early.finish(std::chrono::seconds(60));
  INFO(first.err);
  CHECK(first.code == 75);
  CHECK(tiny.exists("early/checkpoints/last/manifest.json"));
  Process warming = tiny.start(sets, "early", {"--resume"});
  REQUIRE(warming.wait_for("epoch 1/50 "));
  warming.send(SIGUSR1);
  CHECK(warming.finish(std::chrono::seconds(60)).code == 75);
  CHECK(tiny.json("early/checkpoints/last/state.json")["step"].get<int64_t>() > 0);
}

TEST_CASE("signals: --check-data and --pack end at once and leave nothing behind") {
  const TinyRun tiny;
  tiny.write("out.pack", "old");
  const std::string tool = GENERATE("--check-data", "--pack");
  Args more{tool};
  if (tool == "--pack") more.push_back("out.pack");
  Process process = tiny.start({"data.train_size=200000"}, "run", more);
  REQUIRE(process.wait_for(tool == "--pack" ? "packing" : "checking"));
  process.send(SIGINT);
  const ProcessResult result = process.finish(std::chrono::seconds(60));
  INFO(result.err);
  CHECK(result.code == 128 + SIGINT);
  CHECK_THAT(result.err, Contains("stopped by signal 2"));
  CHECK(read_text(tiny.path("out.pack")) == "old");
  CHECK_FALSE(tiny.exists("out.pack.tmp"));
}
