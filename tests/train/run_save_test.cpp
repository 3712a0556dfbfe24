// A run and its checkpoints: written beside training, tried again, kept, and never in the way of the end.
#include <unistd.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <cerrno>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "mesa/base/files.h"
#include "mesa/train/checkpoint.h"
#include "mesa/train/files.h"
#include "mesa/train/plan.h"
#include "mesa/train/setup.h"
#include "mesa/train/trainer.h"
#include "support/data_files.h"
#include "support/tiny_config.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;
namespace fs = std::filesystem;

namespace {

const std::string kConfig = kTinyTraining + "storage: [{match: \"*\", codec: int8, groups: heads, range: running}]\n";

struct SavedRun {
  TemporaryFolder folder;
  ~SavedRun() { set_file_fault({}); }
  std::string path(const std::string& name) const { return (folder.path() / name).string(); }
  std::string text(const std::string& name) const { return read_text(path(name)); }
  RunConfig config(const std::vector<std::string>& sets, const std::string& output) const {
    std::vector<std::string> all{"train.checkpoint_interval=1"};
    all.insert(all.end(), sets.begin(), sets.end());
    RunConfig config = parse_config(kConfig, "tiny.yaml", all);
    config.output = path(output);
    return config;
  }
  int run(const std::vector<std::string>& sets = {}, const std::string& output = "run", const std::string& resume = "") const {
    return train(config(sets, output), {resume, true});
  }
  std::set<std::string> checkpoints(const std::string& output = "run") const {
    std::set<std::string> out;
    for (const auto& entry : fs::directory_iterator(path(output + "/checkpoints"))) out.insert(entry.path().filename().string());
    return out;
  }
  std::vector<nlohmann::json> rows(const std::string& output = "run") const {
    std::vector<nlohmann::json> out;
    std::istringstream lines(text(output + "/metrics.jsonl"));
    for (std::string line; std::getline(lines, line);) out.push_back(nlohmann::json::parse(line));
    return out;
  }
};

bool of_checkpoint(const std::string& path, const std::string& name) { return path.find("/checkpoints/" + name) != std::string::npos; }

int occurrences(const std::string& text, const std::string& word) {
  int count = 0;
  for (size_t at = text.find(word); at != std::string::npos; at = text.find(word, at + 1)) ++count;
  return count;
}

}  // namespace

TEST_CASE("run: steps go on while a checkpoint is written, and what is written is of its own step") {
  const SavedRun straight, t;
  const std::vector<std::string> sets{"train.checkpoint_interval=4", "train.steps=6"};
  REQUIRE(straight.run(sets) == 0);
  // The disk stands still from the first checkpoint until the metrics of the sixth step are there.
  std::atomic<bool> stood = false;
  set_file_fault([&](std::string_view operation, const std::string& path) {
    if (operation == "open" && of_checkpoint(path, "last.tmp/model") && !stood.exchange(true)) {
      for (int i = 0; i < 5000 && t.rows().size() < 6; ++i) usleep(2000);
      return t.rows().size() < 6 ? EIO : 0;
    }
    return 0;
  });
  REQUIRE(t.run(sets) == 0);
  set_file_fault({});
  CHECK(stood);
  const auto rows = t.rows();
  REQUIRE(rows.size() == 6);
  CHECK(rows[3]["checkpoint_writing"] == 0.0);
  CHECK(rows[4]["checkpoint_writing"] == 1.0);
  CHECK(rows[5]["checkpoint_writing"] == 1.0);
  CHECK(rows[5]["checkpoint_step"].is_null());
  CHECK_THAT(t.text("run/log.txt"),
             Contains("checkpoint of step 4 written as last: ") && Contains("checkpoint of step 6 written as best, last: "));
  for (const char* file : {"model.safetensors", "state.safetensors"})
    CHECK(t.text(concat("run/checkpoints/last/", file)) == straight.text(concat("run/checkpoints/last/", file)));
}

TEST_CASE("run: what the plan says of the copy is what the meter finds from the second step on") {
  if (is_gpu(choose_device("auto"))) return;  // whose copy is on the host
  const SavedRun t;
  for (const char* average : {"train.ema_decay=0", "train.ema_decay=0.9"}) {
    const RunConfig config = t.config({average, "train.steps=3"}, average);
    const Plan plan = plan_run(config, model_config(config, 10));
    Allocator::of(kCpu).reset_peak();
    REQUIRE(train(config, {"", true}) == 0);
    int64_t bytes = 0;
    const std::string last = config.output + "/checkpoints/last/";
    for (const char* file : {"model.safetensors", "ema.safetensors", "state.safetensors"})
      if (fs::exists(last + file))
        for (const NamedTensor& tensor : read_safetensors(last + file).tensors) bytes += tensor.tensor.bytes();
    CHECK(plan.checkpoint_bytes <= bytes);  // running ranges come with the first values
    CHECK(plan.checkpoint_bytes > 0.99 * static_cast<double>(bytes));
    const auto rows = t.rows(average);
    const int64_t without = rows[0]["peak_bytes"], with = rows[1]["peak_bytes"];
    CHECK(with - without > plan.checkpoint_bytes / 2);
    CHECK(std::abs(static_cast<double>(with - plan.peak.peak)) < 0.1 * static_cast<double>(with));
    CHECK(rows[2]["peak_bytes"].get<double>() < 1.01 * static_cast<double>(with));
  }
}

TEST_CASE("run: the steps of the checkpoints are those asked for, and the older ones stay") {
  const SavedRun t;
  REQUIRE(t.run({"train.checkpoint_interval=2", "train.keep=3"}) == 0);
  // 2, 4, the end of the first epoch at 6, 8, 10, and 12 as `last`.
  CHECK(t.checkpoints() == std::set<std::string>{"best", "last", "step-00000006", "step-00000008", "step-00000010"});
  const auto step = [&](const std::string& name) {
    return nlohmann::json::parse(t.text("run/checkpoints/" + name + "/state.json"))["step"];
  };
  for (const int64_t s : {6, 8}) CHECK(step(concat("step-0000000", s)) == s);
  CHECK(step("last") == 12);
  const std::string whole = t.text("run/checkpoints/last/model.safetensors");
  fs::remove(t.path("run/checkpoints/last/manifest.json"));
  fs::resize_file(t.path("run/checkpoints/best/model.safetensors"), 99);
  REQUIRE(t.run({"train.checkpoint_interval=2", "train.keep=3"}, "run", "auto") == 0);
  const std::string log = t.text("run/log.txt");
  CHECK_THAT(log, Contains("last cannot be used: ") && Contains("manifest.json is missing") && Contains("resumed from ") &&
                      Contains("step-00000010 after epoch 1, step 10"));
  CHECK(t.text("run/checkpoints/last/model.safetensors") == whole);
  fs::remove_all(t.path("run/checkpoints/best"));
  fs::copy(t.path("run/checkpoints/last"), t.path("run/checkpoints/best"));
  // With a smaller number the oldest go, and by hand any of them is resumed; what came after it is then of a past that is no more.
  const std::string old = t.path("run/checkpoints/step-00000008");
  REQUIRE(fs::exists(old));
  REQUIRE(t.run({"train.checkpoint_interval=2", "train.keep=1", "train.steps=9"}, "run", old) == 0);
  CHECK(t.checkpoints() == std::set<std::string>{"best", "last", "step-00000008"});
  // `best` is of a later step of that past: it stays, and nobody goes on from it.
  CHECK(step("best") == 12);
  REQUIRE(t.run({"train.checkpoint_interval=2", "train.keep=1", "train.steps=10"}, "run", "auto") == 0);
  CHECK_THAT(t.text("run/log.txt"), Contains("checkpoints/last after epoch 1, step 9"));
  CHECK(step("last") == 10);
}

TEST_CASE("run: one that dies between the two renames at the end of an epoch goes on from the newer checkpoint") {
  const SavedRun straight, t;
  REQUIRE(straight.run() == 0);
  REQUIRE(t.run({"train.steps=6"}) == 0);
  int resumed = 0;
  for (const std::string& wish : {std::string("auto"), t.path("run")}) {  // as if `last` of the second epoch had not come to the disk
    fs::remove_all(t.path("run/checkpoints/best"));
    fs::copy(straight.path("run/checkpoints/last"), t.path("run/checkpoints/best"));
    REQUIRE(t.run({}, "run", wish) == 0);
    CHECK(occurrences(t.text("run/log.txt"), "resumed from " + t.path("run/checkpoints/best") + " after epoch 2, step 12") == ++resumed);
  }
}

TEST_CASE("run: a checkpoint that cannot be written is warned of and tried again, training goes on") {
  const SavedRun t;
  const std::string name = GENERATE("last", "best");
  std::atomic<int> failures = 0;
  set_file_fault([&](std::string_view operation, const std::string& path) {
    return operation == "write" && of_checkpoint(path, name + ".tmp") && ++failures <= 2 ? ENOSPC : 0;
  });
  REQUIRE(t.run() == 0);
  set_file_fault({});
  CHECK(failures > 2);
  const std::string log = t.text("run/log.txt");
  CHECK(occurrences(log, "could not be written: '" + name + "': cannot write ") == 2);
  CHECK_THAT(log, Contains("tried again"));
  for (const char* which : {"last", "best"}) CHECK_NOTHROW(verify_folder(t.path(concat("run/checkpoints/", which))));
  const SavedRun straight;
  REQUIRE(straight.run() == 0);
  for (const char* file : {"last/model.safetensors", "last/state.safetensors"})
    CHECK(t.text(concat("run/checkpoints/", file)) == straight.text(concat("run/checkpoints/", file)));
}

TEST_CASE("run: what could not be saved as best is tried again before anything takes its place") {
  const SavedRun t;
  std::atomic<int64_t> attempts = 0;
  set_file_fault([&](std::string_view operation, const std::string& path) {
    if (operation == "open" && of_checkpoint(path, "best.tmp/model")) ++attempts;
    return operation == "open" && of_checkpoint(path, "best.tmp") && attempts == 1 ? EIO : 0;
  });
  REQUIRE(t.run({"train.epochs=3", "optimizer.lr=1e-12"}) == 0);  // no epoch is better than the first
  set_file_fault({});
  CHECK(attempts == 2);
  CHECK(nlohmann::json::parse(t.text("run/checkpoints/best/state.json"))["epoch"] == 1);
}

TEST_CASE("run: a resumed run judges by the best that lies there, and begins anew beside no checkpoint") {
  const SavedRun t;
  const std::vector<std::string> still{"optimizer.lr=1e-12", "train.keep=2"};  // no epoch is better than another
  const auto with = [&](const std::string& epochs) {
    std::vector<std::string> sets = still;
    sets.push_back("train.epochs=" + epochs);
    return sets;
  };
  REQUIRE(t.run(with("2")) == 0);
  const std::string best = t.path("run/checkpoints/best");
  nlohmann::json state = nlohmann::json::parse(t.text("run/checkpoints/best/state.json"));
  REQUIRE(state["epoch"] == 1);
  state["best_top1"] = 0.0;  // another run's, say
  std::ofstream(best + "/state.json") << state.dump(2);
  REQUIRE(t.run(with("3"), "run", "auto") == 0);
  CHECK(nlohmann::json::parse(t.text("run/checkpoints/best/state.json"))["epoch"] == 3);
  for (const char* name : {"run/summary.csv", "run/checkpoints/last", "run/checkpoints/best"}) fs::remove_all(t.path(name));
  CHECK_THROWS_WITH(t.run(with("1")), Contains("holds a run already"));
}

TEST_CASE("run: a disk without room for anything from some moment on does not stop training") {
  const SavedRun t;
  REQUIRE(t.run({"train.epochs=1"}) == 0);
  const std::string before = t.text("run/checkpoints/last/model.safetensors");
  const int code = GENERATE(ENOSPC, EIO, EDQUOT);
  std::atomic<int64_t> operations = 0;
  set_file_fault([&](std::string_view operation, const std::string& path) {
    const bool data = operation == "write" || operation == "open" || operation == "mkdir";
    return data && path.find("/run/") != std::string::npos && ++operations > 30 ? code : 0;
  });
  CHECK(t.run({"train.epochs=3", "train.tensorboard=true", "train.health_interval=2"}, "run", "auto") == 1);
  set_file_fault({});
  CHECK(operations > 60);
  const std::string log = t.text("run/log.txt");
  CHECK_THAT(log, Contains("epoch 3/3") && Contains("could not be written") && Contains("not everything could be written"));
  CHECK_NOTHROW(verify_folder(t.path("run/checkpoints/last")));
  REQUIRE(t.run({"train.epochs=3"}, "run", "auto") == 0);
  const SavedRun straight;
  REQUIRE(straight.run({"train.epochs=1"}) == 0);
  REQUIRE(straight.run({"train.epochs=3"}, "run", "auto") == 0);
  CHECK(t.text("run/checkpoints/last/model.safetensors") == straight.text("run/checkpoints/last/model.safetensors"));
}

TEST_CASE("run: the slow disk of an interval that is too short is waited for, and told") {
  const SavedRun t;
  set_file_fault([&](std::string_view operation, const std::string& path) {
    if (operation == "rename" || operation == "exchange")
      if (of_checkpoint(path, "last")) usleep(1'500'000);
    return 0;
  });
  REQUIRE(t.run({"train.steps=3"}) == 0);
  set_file_fault({});
  const std::string log = t.text("run/log.txt");
  CHECK(occurrences(log, "training waited ") == 1);
  for (const int step : {1, 2, 3}) CHECK_THAT(log, Contains(concat("checkpoint of step ", step, " written as ")));  // none is left out
}
