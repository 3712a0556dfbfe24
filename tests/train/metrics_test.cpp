#include "mesa/train/metrics.h"

#include <fcntl.h>
#include <pty.h>
#include <unistd.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "mesa/base/files.h"

using namespace mesa;
namespace fs = std::filesystem;
using Catch::Matchers::Contains;

namespace {

struct Folder {
  fs::path path;
  Folder() {
    char name[] = "/tmp/mesa-metrics-XXXXXX";
    path = mkdtemp(name);
  }
  ~Folder() { fs::remove_all(path); }
  std::string at(const std::string& name) const { return (path / name).string(); }
};

EpochRow epoch_row(int64_t epoch) {
  return {epoch, 1.5 / epoch, 0.1 + 0.2, 95.25,      kNotMeasured, 1e-3, 812.5,
          1e6,   123456789,   3.25,      10 * epoch, kNotMeasured, 96.5, kNotMeasured};
}
IntervalRow interval_row(int64_t step) { return {step, step / 10, 2.0 / (1 + step), 1e-3, kNotMeasured, 800, 0.01, 5e5, 42, 0, 1}; }

ProgressState state() { return {3, 10, 50, 157, 1.23456, 1e-3, 812.3, 0.012, 4.5e6, 754}; }

std::string drain(int fd) {
  std::string out;
  char block[4096];
  fcntl(fd, F_SETFL, O_NONBLOCK);
  for (ssize_t got; (got = ::read(fd, block, sizeof block)) > 0;) out.append(block, static_cast<size_t>(got));
  return out;
}

}  // namespace

TEST_CASE("metrics: summary.csv has its columns and a row for each epoch") {
  const Folder dir;
  {
    EpochLog log(dir.at("summary.csv"));
    log.append(epoch_row(1));
  }
  CHECK(read_text(dir.at("summary.csv")) ==
        "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr,images_per_second,activation_bytes_per_image,peak_bytes,seconds,step,eval_loss_"
        "ema,"
        "eval_top1_ema,eval_top5_ema\n"
        "1,1.5,0.30000000000000004,95.25,,0.001,812.5,1e+06,123456789,3.25,10,,96.5,\n");
}

TEST_CASE("metrics: a table from before there were averages goes on with empty cells") {
  const Folder dir;
  const std::string columns =
      "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr,images_per_second,activation_bytes_per_image,peak_bytes,seconds";
  std::ofstream(dir.at("old.csv")) << columns << "\n1,1.5,0.3,95,99,0.001,800,1e+06,1,3\n2,1.5,0.3,95,99,0.001,800,1e+06,1,3\n";
  EpochLog(dir.at("old.csv"), 1).append(epoch_row(2));
  CHECK(read_text(dir.at("old.csv")) == columns +
                                            ",step,eval_loss_ema,eval_top1_ema,eval_top5_ema\n1,1.5,0.3,95,99,0.001,800,1e+06,1,3,,,,\n" +
                                            "2,0.75,0.30000000000000004,95.25,,0.001,812.5,1e+06,123456789,3.25,20,,96.5,\n");
  std::ofstream(dir.at("cut.csv")) << "epoch,train_loss\n1,2\n";
  CHECK_THROWS_WITH(EpochLog(dir.at("cut.csv"), 3), Contains("not that of a summary.csv"));
}

TEST_CASE("metrics: a resumed run's files equal those of an uninterrupted one") {
  const Folder dir;
  {
    EpochLog straight(dir.at("a.csv"));
    IntervalLog steps(dir.at("a.jsonl"));
    for (int i = 1; i <= 6; ++i) straight.append(epoch_row(i)), steps.append(interval_row(10 * i));
  }
  {
    EpochLog first(dir.at("b.csv"));
    IntervalLog steps(dir.at("b.jsonl"));
    for (int i = 1; i <= 5; ++i) first.append(epoch_row(i)), steps.append(interval_row(10 * i));
  }
  std::ofstream(dir.at("b.csv"), std::ios::app) << "6,0.1";  // torn by the crash
  std::ofstream(dir.at("b.jsonl"), std::ios::app) << "{\"step\": 60, \"lo";
  {
    EpochLog second(dir.at("b.csv"), 3);
    IntervalLog steps(dir.at("b.jsonl"), 30);
    for (int i = 4; i <= 6; ++i) second.append(epoch_row(i)), steps.append(interval_row(10 * i));
  }
  CHECK(read_text(dir.at("a.csv")) == read_text(dir.at("b.csv")));
  CHECK(read_text(dir.at("a.jsonl")) == read_text(dir.at("b.jsonl")));
  EpochLog missing(dir.at("c.csv"), 3);  // resumed in another folder: starts anew
  CHECK_THAT(read_text(dir.at("c.csv")), Catch::Matchers::StartsWith("epoch,"));
  std::ofstream(dir.at("d.csv")) << "name,price\n1,2\n";
  CHECK_THROWS_WITH(EpochLog(dir.at("d.csv"), 3), Contains("d.csv") && Contains("not that of a summary.csv"));
}

TEST_CASE("metrics: JSON has null for what was not measured") {
  const Folder dir;
  IntervalLog(dir.at("m.jsonl")).append(interval_row(10));
  const auto line = nlohmann::json::parse(read_text(dir.at("m.jsonl")));
  CHECK(line["step"] == 10);
  CHECK(line["grad_norm"].is_null());
  RunSummary summary;
  summary.top1 = 95.5;
  summary.storage = "int8";
  write_summary_json(dir.at("summary.json"), summary);
  const auto json = nlohmann::json::parse(read_text(dir.at("summary.json")));
  CHECK(json["top1"] == 95.5);
  CHECK(json["eval_loss"].is_null());
  for (const char* key :
       {"top1", "top5", "eval_loss", "train_loss", "top1_ema", "top5_ema", "eval_loss_ema", "epochs", "steps", "images_per_second",
        "parameters", "activation_bytes_per_image", "exact_activation_bytes_per_image", "peak_bytes", "device", "storage", "seed"})
    CHECK(json.contains(key));
}

TEST_CASE("metrics: memory.csv quotes shapes") {
  const Folder dir;
  write_memory_csv(dir.at("memory.csv"), std::vector<MemoryRow>{{"blocks.0.mlp.gelu:x", "[2, 3]", "int8", 24, 6, 0.25}});
  CHECK(read_text(dir.at("memory.csv")) ==
        "site,shape,codec,exact_bytes,kept_bytes,saturated\nblocks.0.mlp.gelu:x,\"[2, 3]\",int8,24,6,0.25\n");
}

TEST_CASE("metrics: health.csv resumes without seams, and cells with commas are read back") {
  const Folder dir;
  const std::vector<HealthRow> rows{{10, "a, \"b\":x", "int8", 0.01, 0.5}, {20, "c:x", "int4", kNotMeasured, 0}};
  {
    HealthLog log(dir.at("health.csv"));
    log.append(rows);
  }
  const std::string whole = read_text(dir.at("health.csv"));
  CHECK(parse_csv(whole) == std::vector<std::vector<std::string>>{{"step", "site", "codec", "relative_error", "clamped"},
                                                                  {"10", "a, \"b\":x", "int8", "0.01", "0.5"},
                                                                  {"20", "c:x", "int4", "", "0"}});
  std::ofstream(dir.at("health.csv"), std::ios::app) << "30,torn";
  HealthLog resumed(dir.at("health.csv"), 10);
  resumed.append(std::span(rows).subspan(1));
  CHECK(read_text(dir.at("health.csv")) == whole);
  CHECK(parse_csv("a,\"b\nc\"\r\ntorn,\"x") == std::vector<std::vector<std::string>>{{"a", "b\nc"}});
}

TEST_CASE("metrics: waiting for data is judged over ten seconds at a time") {
  WaitWatch watch;
  CHECK_FALSE(watch.add(9, 9));
  CHECK(watch.add(3, 0) == 0.75);
  for (int i = 0; i < 20; ++i) CHECK_FALSE(watch.add(1, 0.09));
  for (int i = 0; i < 9; ++i) CHECK_FALSE(watch.add(1, 0.2));
  CHECK(*watch.add(1, 0.2) == Approx(0.2));
  CHECK_FALSE(watch.add(10, 1));
}

TEST_CASE("metrics: the slowest rank is told with its share of the median, and warned of after 50 updates") {
  CHECK(slowest_of({1, 4, 2}).rank == 1);
  CHECK(slowest_of({1, 4, 2}).ratio == 2);
  CHECK(slowest_of({3, 1}).ratio == 3);  // of two, the other is the measure
  CHECK(slowest_of({1, 2, 3, 6}).ratio == 3);
  CHECK(slowest_of({0, 0}).ratio == 1);  // a clock that saw nothing
  StragglerWatch watch;
  for (int i = 0; i < 4; ++i) CHECK_FALSE(watch.add({1, 1, 1.6}, 10));
  const auto slow = watch.add({1, 1, 1.6}, 10);
  REQUIRE(slow);
  CHECK(slow->rank == 2);
  CHECK(slow->ratio == Approx(1.6));
  for (int i = 0; i < 20; ++i) CHECK_FALSE(watch.add({1, 1.4, 1}, 10));  // not so slow
  CHECK_FALSE(watch.add({1, 30, 1}, 1));                                 // once
  CHECK_FALSE(watch.add({1, 1, 1}, 99));
}

TEST_CASE("metrics: writers report a place that cannot be written") {
  CHECK_THROWS_WITH(EpochLog("/proc/none/summary.csv"), Contains("/proc/none/summary.csv"));
  CHECK_THROWS_WITH(write_summary_json("/proc/none/s.json", {}), Contains("/proc/none/s.json"));
}

TEST_CASE("progress: a line is never wider than it may be") {
  for (int width = 1; width < 200; ++width) CHECK(static_cast<int>(format_progress(state(), width).size()) <= width);
  const std::string wide = format_progress(state(), 199);
  for (const char* part :
       {"epoch 3/10", "[=", " 32%", "step 50/157", "ETA 12:34", "loss 1.2346", "812 img/s", "lr 1.0e-03", "wait 1.2%", "kept 4.5 MB"})
    CHECK_THAT(wide, Contains(part));
  CHECK_THAT(format_progress(state(), 40), Contains("epoch 3/10") && Contains("ETA 12:34"));
  CHECK_THAT(format_progress(state(), 79), Contains("lr 1.0e-03") && Contains("wait 1.2%"));
  CHECK_THAT(format_progress(state(), 0), !Contains("[=") && Contains("kept 4.5 MB"));
  CHECK(format_progress(ProgressState{}, 80).size() <= 80);
  CHECK(format_duration(3723) == "1:02:03");
  CHECK(format_duration(59.6) == "1:00");
  CHECK(format_duration(kNotMeasured) == "-:--");
}

TEST_CASE("progress: plain lines each interval when not on a terminal") {
  int ends[2];
  REQUIRE(pipe(ends) == 0);
  double now = 0;
  {
    Progress progress(20, 0, 4, ends[1], [&] { return now; });
    for (int step = 1; step <= 10; ++step) {
      now += 2;
      ProgressState s = state();
      s.step = step, s.steps = 10;
      progress.update(s);
    }
    progress.print("saved");
  }
  const std::string out = drain(ends[0]);
  CHECK(std::count(out.begin(), out.end(), '\n') == 4);  // steps 4, 8, 10 and the message
  CHECK(out.find('\r') == std::string::npos);
  CHECK_THAT(out, Contains("step 4/10  ETA 0:32") && Contains("step 10/10  ETA 0:20") && Contains("saved\n"));
  close(ends[0]);
  close(ends[1]);
}

TEST_CASE("progress: on a terminal one line is redrawn, at most ten times a second") {
  int master = 0, slave = 0;
  winsize size{24, 60, 0, 0};
  REQUIRE(openpty(&master, &slave, nullptr, nullptr, &size) == 0);
  double now = 0;
  Progress progress(1000, 0, 50, slave, [&] { return now; });
  std::string out;
  for (int step = 1; step <= 1000; ++step) {
    now += 0.001;
    ProgressState s = state();
    s.step = step, s.steps = 1000;
    progress.update(s);
    out += drain(master);
  }
  now += 1;
  progress.tell("evaluating 1%");
  progress.tell("evaluating 2%");  // too soon
  progress.print("a note");
  progress.finish();
  out += drain(master);
  const auto redraws = std::count(out.begin(), out.end(), '\r');
  CHECK(redraws >= 10);
  CHECK(redraws <= 16);  // twelve, the note's and those that the terminal adds to newlines
  CHECK_THAT(out, Contains("\revaluating 1%\x1b[K") && !Contains("evaluating 2%"));
  size_t from = 0;
  while (from < out.size()) {
    const size_t end = std::min(out.find_first_of("\r\n", from), out.size());
    std::string line = out.substr(from, end - from);
    for (size_t at; (at = line.find("\x1b[K")) != std::string::npos;) line.erase(at, 3);
    CHECK(line.size() < 60);
    from = end + 1;
  }
  CHECK_THAT(out, Contains("a note"));
  close(master);
  close(slave);
}
