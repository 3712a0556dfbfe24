// What a run shows of itself: pictures, event files, health, report.html and warnings, in runs of a second.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cerrno>
#include <filesystem>
#include <set>

#include "apps/tiny_run.h"
#include "mesa/train/files.h"
#include "mesa/train/pictures.h"
#include "mesa/train/report.h"
#include "mesa/train/safetensors.h"
#include "mesa/train/trainer.h"
#include "support/html.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;
namespace fs = std::filesystem;

namespace {

/// Runs kTinyConfig in this process.
struct WatchedRun {
  TemporaryFolder folder;
  ~WatchedRun() { set_file_fault({}); }
  std::string path(const std::string& name) const { return (folder.path() / name).string(); }
  std::string text(const std::string& name) const { return read_text(path(name)); }
  int run(const Args& sets = {}, const std::string& output = "run", const std::string& resume = "") const {
    RunConfig config = parse_config(kConfig, "tiny.yaml", sets);
    config.output = path(output);
    return train(config, {resume, true});
  }
  std::vector<std::string> event_files(const std::string& output = "run") const {
    std::set<std::string> out;
    for (const auto& entry : fs::directory_iterator(path(output)))
      if (entry.path().filename().string().starts_with("events.out.tfevents.")) out.insert(entry.path().string());
    return {out.begin(), out.end()};
  }
  static constexpr const char* kConfig =
      "model: {name: vit, image_size: 16, patch_size: 8, width: 24, depth: 1, heads: 3, pool: mean}\n"
      "data: {kind: shapes, train_size: 96, test_size: 32, workers: 1, flip: 0.5}\n"
      "train: {epochs: 2, batch_size: 16, log_interval: 1, threads: 1}\n"
      "optimizer: {lr: 1e-3}\n"
      "storage: [{match: \"*\", codec: int8, groups: heads, range: running}, {match: \"patch_embed.proj:x\", codec: exact}]\n";
};

std::string weights_of(const std::string& file) {
  std::string out;
  for (const NamedTensor& t : read_safetensors(file).tensors)
    out += t.name + std::string(static_cast<const char*>(t.tensor.raw()), static_cast<size_t>(t.tensor.bytes()));
  return out;
}

size_t occurrences(const std::string& text, const std::string& part) {
  size_t n = 0;
  for (size_t at = 0; (at = text.find(part, at)) != std::string::npos; at += part.size()) ++n;
  return n;
}

}  // namespace

TEST_CASE("run watch: a run leaves its pictures, its environment and a report") {
  const WatchedRun t;
  REQUIRE(t.run() == 0);
  const PictureList samples = read_pictures(t.path("run/samples.json")), mistakes = read_pictures(t.path("run/mistakes.json"));
  CHECK(samples.pictures.size() == 16);
  CHECK(samples.epoch == 1);
  CHECK_FALSE(samples.predictions);
  CHECK(mistakes.epoch == 2);
  CHECK(mistakes.step == 12);
  const RunRecord run = read_run(t.path("run"));
  CHECK(run.notes.empty());
  // Of 32 test pictures those that are not right are all there, in order.
  CHECK(mistakes.pictures.size() == static_cast<size_t>(32 - std::lround(0.32 * run.summary.top1)));
  for (size_t i = 0; i < mistakes.pictures.size(); ++i) {
    CHECK(mistakes.pictures[i].label != mistakes.pictures[i].predicted);
    if (i > 0) CHECK(mistakes.pictures[i].index > mistakes.pictures[i - 1].index);
  }
  CHECK(run.intervals.size() == 12);
  CHECK(run.epochs.at(1).step == 12);
  CHECK(run.environment.size() >= 6);
  const std::string html = t.text("run/report.html");
  walk_html(html);
  CHECK_THAT(html, Contains("Mistakes on the test set") && Contains("epoch 2") && Contains("Training pictures"));
  CHECK(t.event_files().empty());
  CHECK_FALSE(fs::exists(t.path("run/health.csv")));
  SECTION("the pictures are the first batch as it is trained on, and a resumed run keeps them") {
    const std::string before = t.text("run/samples.json");
    REQUIRE(t.run({"train.epochs=3"}, "run", "auto") == 0);
    CHECK(t.text("run/samples.json") == before);
    CHECK(read_pictures(t.path("run/mistakes.json")).epoch == 3);
    REQUIRE(t.run({"data.flip=1"}, "flipped") == 0);
    CHECK(t.text("flipped/samples.json") != before);
  }
}

TEST_CASE("run watch: looking changes nothing of what is trained") {
  const WatchedRun t;
  REQUIRE(t.run() == 0);
  REQUIRE(t.run({"train.tensorboard=true", "train.health_interval=1", "train.histograms=[\"*.weight\", \"*:x\"]", "train.accumulation=1"},
                "watched") == 0);
  for (const char* file : {"/checkpoints/last/model.safetensors", "/checkpoints/last/state.safetensors"})
    CHECK(weights_of(t.path(std::string("run") + file)) == weights_of(t.path(std::string("watched") + file)));
}

TEST_CASE("run watch: health.csv has each site that packs, at the steps that were asked for") {
  const WatchedRun t;
  REQUIRE(t.run({"train.health_interval=3", "train.epochs=1"}) == 0);
  const std::vector<HealthRow> rows = read_run(t.path("run")).health;
  std::set<int64_t> steps;
  std::set<std::string> codecs;
  double worst = 0, clamped = 0;
  for (const HealthRow& row : rows) {
    steps.insert(row.step);
    codecs.insert(row.codec);
    if (row.codec == "exact") CHECK(row.relative_error == 0);
    if (row.codec == "int8") CHECK(row.relative_error > 1e-4);
    worst = std::max(worst, row.relative_error);
    clamped = std::max(clamped, row.clamped);
  }
  CHECK(steps == std::set<int64_t>{3, 6});
  CHECK(codecs == std::set<std::string>{"exact", "int8"});
  CHECK(worst < 0.2);
  CHECK(clamped > 0);
  CHECK(clamped < 0.2);
  CHECK_THAT(t.text("run/report.html"), Contains("Health of the storage") && Contains("id=\"chart-error\""));
  SECTION("fewer bits, larger errors") {
    const auto mean = [&](const std::string& output) {
      double sum = 0;
      int n = 0;
      for (const HealthRow& row : read_run(t.path(output)).health)
        if (row.codec != "exact") sum += row.relative_error, ++n;
      return sum / n;
    };
    REQUIRE(t.run({"train.health_interval=3", "train.epochs=1", "storage=[{match: \"*\", codec: int4, groups: heads}]"}, "int4") == 0);
    CHECK(mean("int4") > 5 * mean("run"));
    CHECK(mean("int4") < 40 * mean("run"));
  }
  SECTION("a resumed run goes on without seams") {
    const Args sets{"train.health_interval=3", "schedule.name=constant"};
    REQUIRE(t.run({sets[0], sets[1], "train.epochs=1"}, "stopped") == 0);
    REQUIRE(t.run(sets, "stopped", "auto") == 0);
    REQUIRE(t.run(sets, "straight") == 0);
    CHECK(t.text("stopped/health.csv") == t.text("straight/health.csv"));
  }
}

TEST_CASE("run watch: event files have the run's scalars, and histograms of what was asked for") {
  const WatchedRun t;
  REQUIRE(t.run({"train.tensorboard=true", "train.health_interval=4", "train.histograms=[blocks.0.mlp.fc1.weight, \"*.act:x\"]",
                 "train.epochs=1"}) == 0);
  REQUIRE(t.event_files().size() == 1);
  const std::string events = read_text(t.event_files()[0]);
  for (const char* tag :
       {"train/loss", "train/learning_rate", "train/gradient_norm", "train/images_per_second", "train/data_wait", "eval/top1", "eval/loss",
        "epoch/train_loss", "weight/blocks.0.mlp.fc1.weight", "gradient/blocks.0.mlp.fc1.weight", "site/blocks.0.mlp.act:x"})
    CHECK_THAT(events, Contains(tag));
  CHECK(occurrences(events, "train/loss") == 6);
  CHECK(occurrences(events, "eval/top1") == 1);
  CHECK(occurrences(events, "weight/") == 1);
  CHECK(occurrences(events, "site/") == 1);
  REQUIRE(t.run({"train.tensorboard=true", "train.epochs=2"}, "run", "auto") == 0);
  REQUIRE(t.event_files().size() == 2);
  CHECK(occurrences(read_text(t.event_files()[1]), "train/loss") == 6);
  // It begins with step 7 (field 2) and a SessionLog (field 7) whose status (field 1) is START.
  CHECK_THAT(read_text(t.event_files()[1]), Contains("\x10\x07\x3a\x02\x08\x01"));
}

TEST_CASE("run watch: a wish for histograms that cannot be had is refused before anything is made") {
  const WatchedRun t;
  const auto refusal = [&](const Args& sets) { return error_of([&] { t.run(sets); }); };
  CHECK_THAT(refusal({"train.histograms=[\"*\"]"}), Contains("train.histograms: needs train.tensorboard: true"));
  CHECK_THAT(refusal({"train.tensorboard=true", "train.histograms=[blocks.0.mlp.fc1.weigth]"}),
             Contains("--set train.histograms") && Contains("matches no parameter and no site") && Contains("blocks.0.mlp.fc1.weight"));
  CHECK_THAT(refusal({"train.tensorboard=true", "train.histograms=[\"*.act:x\"]"}), Contains("train.health_interval"));
  CHECK_THAT(refusal({"train.cuda_graph=true", "train.health_interval=5"}),
             Contains("train.health_interval: cannot look into recorded passes"));
  CHECK_FALSE(fs::exists(t.path("run")));
}

TEST_CASE("run watch: what cannot be written is warned of once, and the run is as good as ever") {
  const WatchedRun t;
  const std::string file = GENERATE("report.html", "mistakes.json", "samples.json", "environment.json", "health.csv", "events.out");
  set_file_fault([&](std::string_view operation, const std::string& path) {
    return operation == "write" && path.find(file) != std::string::npos ? ENOSPC : 0;
  });
  CHECK(t.run({"train.tensorboard=true", "train.health_interval=2"}) == 0);
  set_file_fault({});
  const std::string log = t.text("run/log.txt");
  CHECK(occurrences(log, "No space left") == 1);
  CHECK_THAT(log, Contains("training goes on"));
  CHECK_NOTHROW(write_report({t.path("run")}));
}

TEST_CASE("run watch: each odd thing is warned of once, and the log has all") {
  const TinyRun tiny;
  const ProcessResult result = tiny.train({"optimizer.lr=1e15", "train.max_bad_steps=4"}, "run", {"--quiet"});
  CHECK(result.code == 1);
  INFO(result.err);
  CHECK(occurrences(result.err, "is skipped") == 1);
  CHECK(occurrences(read_text(tiny.path("run/log.txt")), "is skipped") == 4);
  CHECK_THAT(read_text(tiny.path("run/report.html")), Contains("is skipped") && Contains("not finite"));
}

TEST_CASE("run watch: ranges that fit badly are warned of once") {
  const TinyRun tiny;
  const ProcessResult result = tiny.train(
      {"train.epochs=3", "storage=[{match: \"*\", codec: int8, groups: heads, range: running, decay: 0.999}]"}, "run", {"--quiet"});
  INFO(result.err);
  CHECK(result.code == 0);
  CHECK(occurrences(result.err, "lay outside its running range") == 1);
  const ProcessResult current =
      tiny.train({"storage=[{match: \"*\", codec: int8, groups: heads, range: current}]"}, "current", {"--quiet"});
  CHECK_THAT(current.err, !Contains("running range"));
  // memory.csv keeps the last epoch's shares.
  double worst = 0;
  for (const MemoryRow& row : read_run(tiny.path("run")).memory) worst = std::max(worst, row.saturated);
  CHECK(worst > 0.01);
}

TEST_CASE("run watch: mesa-report writes what was asked for, and refuses what is no run") {
  const TinyRun tiny;
  REQUIRE(tiny.train({"train.epochs=1"}, "a").code == 0);
  REQUIRE(tiny.train({"train.epochs=1", "storage=int4"}, "b").code == 0);
  const ProcessResult one = tiny.call("mesa-report", {"a", "-o", "one.html"}), both = tiny.call("mesa-report", {"a", "b/"});
  CHECK(one.code == 0);
  CHECK(one.out == "one.html\n");
  CHECK(both.code == 0);
  CHECK(both.out == "report.html\n");
  walk_html(read_text(tiny.path("one.html")));
  walk_html(read_text(tiny.path("report.html")));
  std::filesystem::remove(tiny.path("a/report.html"));
  CHECK(tiny.call("mesa-report", {"a/"}).out == "a//report.html\n");
  CHECK(tiny.exists("a/report.html"));
  CHECK(tiny.call("mesa-report", {}).code == 2);
  const ProcessResult wrong = tiny.call("mesa-report", {"."}), absent = tiny.call("mesa-report", {"a", "absent"});
  CHECK(wrong.code == 1);
  CHECK_THAT(wrong.err, Contains("is not a run's folder"));
  CHECK(absent.code == 1);
  CHECK_THAT(absent.err, Contains("absent does not exist"));
}
