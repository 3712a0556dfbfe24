// A run of a second: the config that the tests of the apps share, and how they read its folder.
#pragma once
#include <catch2/catch.hpp>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "mesa/base/files.h"
#include "support/data_files.h"
#include "support/process.h"
#include "support/tiny_config.h"

namespace mesa::testing {

using mesa::read_text;
using Args = std::vector<std::string>;
using Json = nlohmann::json;

inline const std::string kTinyConfig = kTinyTraining + "device: cpu\nstorage: int8\n";

/// A temporary folder with tiny.yaml in it; programs run there.
class TinyRun {
 public:
  TinyRun() { write("tiny.yaml", kTinyConfig); }
  std::string path(const std::string& name) const { return (folder_.path() / name).string(); }
  void write(const std::string& name, const std::string& text) const { std::ofstream(path(name), std::ios::binary) << text; }
  Json json(const std::string& name) const { return Json::parse(read_text(path(name))); }
  bool exists(const std::string& name) const { return std::filesystem::exists(path(name)); }

  Args train_args(const Args& sets, const std::string& output = "run", const Args& more = {}) const {
    Args args{"--config", "tiny.yaml", "--output", output};
    for (const std::string& set : sets) args.insert(args.end(), {"--set", set});
    args.insert(args.end(), more.begin(), more.end());
    return args;
  }
  ProcessResult train(const Args& sets = {}, const std::string& output = "run", const Args& more = {}) const {
    return call("mesa-train", train_args(sets, output, more));
  }
  ProcessResult eval(const Args& args) const { return call("mesa-eval", args); }
  ProcessResult call(const std::string& program, const Args& args) const { return mesa::testing::run(program, args, {}, path(".")); }
  Process start(const Args& sets, const std::string& output, const Args& more = {}) const {
    return Process("mesa-train", train_args(sets, output, more), {}, path("."));
  }

  /// metrics.jsonl without what depends on the clock.
  std::vector<Json> metrics(const std::string& output) const {
    std::vector<Json> rows;
    std::istringstream lines(read_text(path(output + "/metrics.jsonl")));
    for (std::string line; std::getline(lines, line);) {
      rows.push_back(Json::parse(line));
      for (const char* timed : {"images_per_second", "data_wait", "data_read", "data_decode", "data_augment", "rank_seconds", "sync_wait",
                                "slowest_rank", "slowest_ratio", "checkpoint_step", "checkpoint_writing"})
        rows.back().erase(timed);
    }
    return rows;
  }
  /// summary.csv without what depends on the clock: images_per_second and seconds.
  std::vector<std::vector<std::string>> curve(const std::string& output) const {
    auto rows = read_csv(path(output + "/summary.csv"));
    for (auto& row : rows) row.resize(14), row[6] = row[9] = "";
    return rows;
  }

 private:
  TemporaryFolder folder_;
};

/// The same steps with the same losses, up to `tolerance` relative.
inline void check_close(const std::vector<Json>& a, const std::vector<Json>& b, double tolerance) {
  REQUIRE(a.size() == b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    CAPTURE(i);
    for (const char* key : {"loss", "grad_norm"}) {
      const double x = a[i].at(key), y = b[i].at(key);
      CHECK(std::fabs(x - y) <= tolerance * std::fabs(x));
    }
    CHECK(a[i].at("lr") == b[i].at("lr"));
    CHECK(a[i].at("step") == b[i].at("step"));
  }
}

}  // namespace mesa::testing
