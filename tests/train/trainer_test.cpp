// The trainer in this process: what a full disk, NaN and infinity do to a run.
#include "mesa/train/trainer.h"

#include <omp.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "mesa/base/files.h"
#include "mesa/base/random.h"
#include "mesa/tensor/memory.h"
#include "mesa/train/checkpoint.h"
#include "mesa/train/files.h"
#include "mesa/train/safetensors.h"
#include "support/data_files.h"
#include "support/device.h"
#include "support/tiny_config.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;
namespace fs = std::filesystem;

namespace {

const std::string kTiny =
    kTinyTraining +
    "storage: [{match: \"*\", codec: int8, groups: heads, range: running}, {match: \"patch_embed.proj:x\", codec: exact}]\n";

struct Trainer {
  TemporaryFolder folder;
  int threads = omp_get_max_threads();
  ~Trainer() {
    set_file_fault({});
    omp_set_num_threads(threads);
  }
  std::string path(const std::string& name) const { return (folder.path() / name).string(); }
  std::string text(const std::string& name) const { return read_text(path(name)); }
  int run(std::vector<std::string> sets = {}, const std::string& resume = "") const { return run_config(kTiny, sets, resume); }
  int run_resnet(const std::vector<std::string>& sets, const std::string& resume = "") const {
    return run_config(
        "model: {name: resnet18, image_size: 24, width: 8, depths: [1, 1]}\n"
        "data: {kind: shapes, train_size: 96, test_size: 32, workers: 1}\n"
        "train: {epochs: 2, batch_size: 16, log_interval: 1, threads: 1}\n",
        sets, resume);
  }
  int run_config(const std::string& text, const std::vector<std::string>& sets, const std::string& resume) const {
    RunConfig config = parse_config(text, "tiny.yaml", sets);
    config.output = path("run");
    return train(config, {resume, true});
  }
};

/// Puts a NaN into a parameter of a checkpoint, which stays whole as a folder.
void poison(const std::string& folder, const std::string& name) {
  std::map<std::string, std::string> files;
  for (const char* file : {"state.json", "state.safetensors"}) files[file] = read_text(folder + "/" + file);
  const SafetensorsFile model = read_safetensors(folder + "/model.safetensors");
  for (const NamedTensor& tensor : model.tensors)
    if (tensor.name == name) tensor.tensor.data<float>()[3] = std::numeric_limits<float>::quiet_NaN();
  write_folder_atomically(folder, [&](const std::string& at) {
    write_safetensors(at + "/model.safetensors", model.tensors, model.metadata);
    for (const auto& [file, text] : files) {
      OutputFile out(at + "/" + file);
      out.write(text);
      out.close();
    }
  });
}

}  // namespace

TEST_CASE("trainer: a disk that is full for a while costs nothing but the old checkpoints") {
  const Trainer t;
  REQUIRE(t.run({"train.epochs=1"}) == 0);
  const std::string before = t.text("run/checkpoints/last/model.safetensors");
  SECTION("to the end: the exit code tells, the old checkpoint is whole") {
    set_file_fault([](std::string_view operation, const std::string& path) {
      return operation == "write" && path.find("/run/config.yaml") == std::string::npos && path.find(".tmp") != std::string::npos &&
                     path.find("checkpoints") != std::string::npos
                 ? ENOSPC
                 : 0;
    });
    CHECK(t.run({"train.epochs=3"}, "auto") == 1);
    set_file_fault({});
    CHECK(t.text("run/checkpoints/last/model.safetensors") == before);
    CHECK_NOTHROW(verify_folder(t.path("run/checkpoints/last")));
    CHECK_THAT(t.text("run/log.txt"), Contains("could not be written") && Contains("No space left"));
    CHECK(nlohmann::json::parse(t.text("run/summary.json"))["epochs"] == 3);
    CHECK(t.run({"train.epochs=3"}, "auto") == 0);  // and there is room again
  }
  SECTION("rows that found no room are written later, none torn") {
    std::atomic<int> failures = 3;
    set_file_fault([&](std::string_view operation, const std::string& path) {
      const bool table = path.find("metrics.jsonl") != std::string::npos || path.find("summary.csv") != std::string::npos;
      return operation == "write" && table && path.find(".tmp") == std::string::npos && failures-- > 0 ? ENOSPC : 0;
    });
    CHECK(t.run({"train.epochs=3"}, "auto") == 0);
    std::istringstream lines(t.text("run/metrics.jsonl"));
    int64_t step = 0;
    for (std::string line; std::getline(lines, line);) CHECK(nlohmann::json::parse(line)["step"] == ++step);
    CHECK(step == 18);
    CHECK(failures < 0);
  }
}

TEST_CASE("trainer: NaN in a checkpoint's weights is named, stops the run, and spares the checkpoints") {
  const Trainer t;
  REQUIRE(t.run({"train.epochs=1"}) == 0);
  const std::string last = t.path("run/checkpoints/last");
  const std::string best = t.text("run/checkpoints/best/model.safetensors");
  poison(last, "blocks.0.mlp.fc1.weight");
  const std::string poisoned = read_text(last + "/model.safetensors");
  CHECK(t.run({"train.epochs=3", "train.max_bad_steps=4"}, "auto") == 1);
  const std::string log = t.text("run/log.txt");
  CHECK_THAT(log, Contains("blocks.0.mlp.fc1.weight (element 3)") && Contains("4 steps in a row were not finite"));
  CHECK(t.text("run/checkpoints/best/model.safetensors") == best);
  CHECK(read_text(last + "/model.safetensors") == poisoned);
  CHECK_NOTHROW(verify_folder(t.path("run/checkpoints/failed")));
  RunConfig config = parse_config(kTiny, "tiny.yaml", {"train.weights=" + last});
  config.output = t.path("other");
  CHECK_THROWS_WITH(train(config, {"", true}),
                    Contains("train.weights: ") && Contains("blocks.0.mlp.fc1.weight (element 3) holds NaN or infinity"));
  CHECK(nlohmann::json::parse(t.text("run/checkpoints/failed/state.json"))["bad_steps"] == 4);
  // The last line of the table counts them too.
  const std::string table = t.text("run/metrics.jsonl");
  CHECK_THAT(table.substr(table.rfind("{\"step\"")), Contains("\"bad_steps\":4") && Contains("\"loss\":null"));
}

TEST_CASE("trainer: running statistics are saved and resumed, and a bad update leaves no trace in them") {
  const std::vector<std::string> sets{"train.accumulation=2", "storage=int8", "schedule.name=constant"};
  const Trainer t, straight;
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.end(), sets.begin(), sets.end());
    return more;
  };
  REQUIRE(t.run_resnet(with({"train.epochs=1"})) == 0);
  const std::string last = t.path("run/checkpoints/last");
  const auto statistics = [](const std::string& folder) {
    std::map<std::string, std::vector<float>> all;
    for (const NamedTensor& tensor : read_safetensors(folder + "/model.safetensors").tensors)
      if (tensor.name.find("running_") != std::string::npos) all[tensor.name] = tensor.tensor.to_vector<float>();
    return all;
  };
  const auto first = statistics(last);
  REQUIRE(first.size() == 12);
  CHECK(first.at("layer2.0.downsample.1.running_var") != std::vector<float>(16, 1.0f));
  SECTION("resumed") {
    REQUIRE(t.run_resnet(with({}), "auto") == 0);
    REQUIRE(straight.run_resnet(with({})) == 0);
    CHECK(statistics(last) != first);
    const bool same = t.text("run/checkpoints/last/model.safetensors") == straight.text("run/checkpoints/last/model.safetensors");
    CHECK(same);
  }
  SECTION("spared") {
    poison(last, "layer2.0.conv1.weight");
    CHECK(t.run_resnet(with({"train.max_bad_steps=2"}), "auto") == 1);
    CHECK(statistics(t.path("run/checkpoints/failed")) == first);
  }
}

TEST_CASE("trainer: a learning rate of 1e15 ends in skipped, named steps and a checkpoint") {
  const Trainer t;
  SECTION("from the start") {
    CHECK(t.run({"optimizer.lr=1e15", "train.max_bad_steps=3"}) == 1);
    CHECK_THAT(t.text("run/log.txt"), Contains("is skipped") && Contains("first bad value is in") && Contains("3 steps in a row"));
    CHECK((fs::exists(t.path("run/checkpoints/last")) || fs::exists(t.path("run/checkpoints/failed"))));
  }
  SECTION("after a good epoch, whose checkpoint stays") {
    REQUIRE(t.run({"train.epochs=1"}) == 0);
    const std::string good = t.text("run/checkpoints/last/model.safetensors");
    CHECK(t.run({"train.epochs=3", "optimizer.lr=1e15", "train.max_bad_steps=3"}, "auto") == 1);
    CHECK(t.text("run/checkpoints/last/model.safetensors") == good);
    CHECK(t.run({"train.epochs=3"}, "auto") == 0);
  }
}

TEST_CASE("trainer: the system is asked for no memory after the first epoch") {
  const Trainer t;
  REQUIRE(t.run({"train.epochs=1", "data.train_size=16"}) == 0);  // one step warms the caches of this process
  fs::remove_all(t.path("run"));
  REQUIRE(t.run({"train.epochs=1"}) == 0);
  const int64_t short_run = Allocator::of(testing::test_device()).use().system_allocations;
  fs::remove_all(t.path("run"));
  REQUIRE(t.run({"train.epochs=6"}) == 0);
  CHECK(Allocator::of(testing::test_device()).use().system_allocations == short_run);
  // Of a GPU the log tells what was taken, which is never less than what was in use.
  const std::string log = t.text("run/log.txt"), mark = "GPU memory: ", middle = " bytes taken, ";
  const size_t at = log.find(mark);
  REQUIRE((at != std::string::npos) == (test_device() == kCuda));
  if (at == std::string::npos) return;
  const int64_t taken = std::stoll(log.substr(at + mark.size())), used = std::stoll(log.substr(log.find(middle, at) + middle.size()));
  CHECK(taken == Allocator::of(kCuda).use().reserved);
  CHECK(taken >= used);
}

TEST_CASE("trainer: recorded passes train bit for bit like those that are handed over one by one") {
  if (test_device() != kCuda) return;
  const Trainer t;
  REQUIRE(t.run({"train.epochs=1"}) == 0);
  fs::rename(t.path("run"), t.path("teacher"));
  const std::string teacher = "distill.teacher=" + t.path("teacher");
  const std::vector<std::vector<std::string>> variants{{"train.precision=bf16"},
                                                       {"train.accumulation=3"},
                                                       {"train.accumulation=4"},
                                                       {"data.cutmix=1", "train.loss=bce"},
                                                       {"distill.kind=soft", teacher, "train.precision=bf16"},
                                                       {"distill.kind=hard", teacher, "data.mixup=0.8"},
                                                       {"optimizer.lr=1e15"}};
  for (const std::vector<std::string>& variant : variants) {
    INFO(variant.front());
    std::string results[2];
    for (const bool recorded : {false, true}) {
      fs::remove_all(t.path("run"));
      std::vector<std::string> sets{"model.drop_path=0.2",
                                    "model.drop_rate=0.1",
                                    "model.width=64",
                                    "model.heads=2",
                                    "train.max_bad_steps=3",
                                    "train.ema_decay=0.8",
                                    concat("train.cuda_graph=", recorded ? "true" : "false")};
      sets.insert(sets.end(), variant.begin(), variant.end());
      const int code = t.run(sets);
      results[recorded] = concat("exit code ", code, "\n");
      std::istringstream lines(t.text("run/metrics.jsonl"));
      for (std::string line; std::getline(lines, line);) {
        const auto row = nlohmann::json::parse(line);
        for (const char* key : {"step", "loss", "grad_norm", "bad_steps"}) results[recorded] += row.at(key).dump() + " ";
      }
      for (const char* file : {"model.safetensors", "ema.safetensors", "state.safetensors"}) {
        const SafetensorsFile kept = read_safetensors(t.path(concat("run/checkpoints/last/", file)));
        CHECK(kept.tensors.size() > 10);
        for (const NamedTensor& tensor : kept.tensors)
          results[recorded] +=
              concat(tensor.name, " ",
                     hash_name({static_cast<const char*>(tensor.tensor.raw()), static_cast<size_t>(tensor.tensor.bytes())}), "\n");
      }
    }
    CHECK(results[0] == results[1]);
  }
}

TEST_CASE("trainer: an error within an update leaves no trace in the running ranges") {
  const Trainer t;
  fs::create_directories(t.path("data"));
  const auto picture = [&](const char* part, int i) { return concat("data/", part, "/", i % 2 ? "a" : "b", "/", i, ".png"); };
  for (const char* part : {"train", "val"})
    for (int i = 0; i < 48; ++i) t.folder.write(picture(part, i), encode_png(test_image(16, 16, 3)));
  std::vector<std::string> sets{"data.kind=image_folder", "data.path=" + t.path("data"), "data.train_size=0", "data.test_size=0",
                                "train.batch_size=4",     "train.accumulation=3",        "data.prefetch=1",   "optimizer.lr=1e-30"};
  const auto ranges = [&] {
    std::string out;
    for (const NamedTensor& tensor : read_safetensors(t.path("run/checkpoints/last/state.safetensors")).tensors)
      if (tensor.name.find("/alpha") != std::string::npos)
        for (const double value : tensor.tensor.to_vector<double>()) out += concat(tensor.name, " ", value, "\n");
    return out;
  };
  int compared = 0;
  for (int damaged = 0; damaged < 24 && compared < 3; ++damaged) {
    fs::remove_all(t.path("run"));
    t.folder.write(picture("train", damaged), Bytes{1, 2, 3});
    const std::string error = error_of([&] { t.run(sets); });
    t.folder.write(picture("train", damaged), encode_png(test_image(16, 16, 3)));
    const size_t at = error.find("step ");
    REQUIRE(at != std::string::npos);
    const int step = std::stoi(error.substr(at + 5));
    if (step == 0) continue;  // nothing was saved
    const std::string after_error = ranges();
    fs::remove_all(t.path("run"));
    sets.push_back(concat("train.steps=", step));
    REQUIRE(t.run(sets) == 0);
    sets.pop_back();
    CHECK(after_error == ranges());
    CHECK(after_error.size() > 100);
    ++compared;
  }
  CHECK(compared > 0);
}

TEST_CASE("trainer: stopped within an epoch and resumed, every optimizer with all it may have goes on bit for bit") {
  const Trainer t;
  const std::string optimizer = GENERATE("adamw", "sgd", "lamb"), precision = GENERATE("fp32", "bf16");
  const std::string schedule = GENERATE("constant", "step");
  CAPTURE(optimizer, precision, schedule);
  std::vector<std::string> sets{"optimizer.name=" + optimizer,
                                "train.precision=" + precision,
                                "train.force_precision=true",
                                "schedule.name=" + schedule,
                                "schedule.warmup_epochs=0.5",
                                "train.accumulation=2",
                                "optimizer.layer_decay=0.7",
                                "optimizer.no_decay=[head.*]",
                                "train.ema_decay=0.8",
                                "train.ema_warmup=true",
                                "model.drop_path=0.2",
                                "train.clip_norm=1",
                                "train.epochs=4",
                                "optimizer.lr_base_batch=16"};
  if (optimizer == "sgd") sets.push_back("optimizer.nesterov=true");
  if (schedule == "step") sets.insert(sets.end(), {"schedule.decay_epochs=1.5", "schedule.decay_rate=0.5"});
  const auto files = [&] {
    std::map<std::string, std::string> out;
    for (const char* file : {"model.safetensors", "ema.safetensors", "state.safetensors"}) {
      const SafetensorsFile kept = read_safetensors(t.path(concat("run/checkpoints/last/", file)));
      CHECK(kept.tensors.size() > 10);
      for (const NamedTensor& tensor : kept.tensors)
        out[concat(file, "/", tensor.name)] =
            std::string(static_cast<const char*>(tensor.tensor.raw()), static_cast<size_t>(tensor.tensor.bytes()));
    }
    const auto state = nlohmann::json::parse(t.text("run/checkpoints/last/state.json"));
    for (const char* key : {"optimizer_steps", "ema_updates", "best_top1", "eval_top1_ema", "eval_loss_ema", "eval_loss"})
      out[key] = state.at(key).dump();
    return out;
  };
  REQUIRE(t.run(sets) == 0);
  const auto straight = files();
  CHECK(straight.at("ema_updates") == "12");
  fs::remove_all(t.path("run"));
  for (const char* stop : {"train.steps=4", "train.steps=5", "train.steps=0"}) {  // the second epoch's first update, its second, the end
    std::vector<std::string> now = sets;
    now.push_back(stop);
    REQUIRE(t.run(now, "auto") == 0);
  }
  const auto resumed = files();
  CHECK(straight.size() == resumed.size());
  for (const auto& [name, bytes] : straight) {
    INFO(name);
    if (name != "best_top1") CHECK(resumed.at(name) == bytes);  // of the stops, too
  }
  CHECK(straight.at("model.safetensors/head.weight") != straight.at("ema.safetensors/head.weight"));
}

TEST_CASE("trainer: an update that is skipped leaves the average alone, and the best checkpoint is the average's") {
  const Trainer t;
  REQUIRE(t.run({"train.epochs=3", "train.ema_decay=0.999", "optimizer.lr=0.01"}) == 0);
  std::istringstream rows(t.text("run/summary.csv"));
  std::string line;
  std::getline(rows, line);
  double best = -1;
  int64_t best_epoch = 0;
  while (std::getline(rows, line)) {
    std::vector<std::string> cells;
    std::istringstream text(line);
    for (std::string cell; std::getline(text, cell, ',');) cells.push_back(cell);
    if (std::stod(cells.at(12)) > best) best = std::stod(cells[12]), best_epoch = std::stoll(cells[0]);
  }
  const auto of_best = nlohmann::json::parse(t.text("run/checkpoints/best/state.json"));
  CHECK(of_best["best_top1"] == best);
  CHECK(of_best["epoch"] == best_epoch);
  fs::remove_all(t.path("run"));
  // Weights that leave the finite numbers: the updates after that are skipped, and no average counts them.
  CHECK(t.run({"optimizer.lr=1e15", "train.max_bad_steps=3", "train.ema_decay=0.9"}) == 1);
  const std::string which = fs::exists(t.path("run/checkpoints/failed")) ? "failed" : "last";
  const auto state = nlohmann::json::parse(t.text(concat("run/checkpoints/", which, "/state.json")));
  CHECK(state["bad_steps"].get<int64_t>() >= 3);
  CHECK(state["ema_updates"].get<int64_t>() == state["step"].get<int64_t>() - state["bad_steps"].get<int64_t>());
  CHECK(state["ema_updates"] == state["optimizer_steps"]);
}

TEST_CASE("trainer: a run without an average may be resumed with one, and another optimizer is refused") {
  const Trainer t;
  REQUIRE(t.run({"train.epochs=1"}) == 0);
  REQUIRE(t.run({"train.epochs=2", "train.ema_decay=0.9"}, "auto") == 0);
  CHECK_THAT(t.text("run/log.txt"), Contains("the checkpoint has no moving average of the weights; it begins with the present ones"));
  CHECK(nlohmann::json::parse(t.text("run/checkpoints/last/state.json"))["ema_updates"] == 6);
  CHECK_THAT(error_of([&] {
               t.run({"train.epochs=3", "optimizer.name=lamb"}, "auto");
             }),
             Contains("--set optimizer.name=lamb: optimizer.name: ") && Contains("was trained by adamw"));
  REQUIRE(t.run({"train.epochs=3"}, "auto") == 0);
  CHECK_FALSE(fs::exists(t.path("run/checkpoints/last/ema.safetensors")));
}

TEST_CASE("trainer: a damaged picture ends the run with its name and a state to resume") {
  const Trainer t;
  fs::create_directories(t.path("data"));
  for (const char* part : {"train", "val"})
    for (int i = 0; i < 40; ++i)
      t.folder.write(concat("data/", part, "/", i % 2 ? "a" : "b", "/", i, ".png"), encode_png(test_image(16, 16, 3)));
  const std::vector<std::string> sets{"data.kind=image_folder", "data.path=" + t.path("data"), "data.train_size=0",
                                      "data.test_size=0",       "train.batch_size=4",          "train.epochs=3",
                                      "data.prefetch=1"};
  REQUIRE(t.run(sets) == 0);
  fs::remove_all(t.path("run"));
  t.folder.write("data/train/a/1.png", Bytes{1, 2, 3});
  const std::string error = error_of([&] { t.run(sets); });
  CHECK_THAT(error, Contains("1.png") && Contains("at epoch 1"));
  auto skipping = sets;
  skipping.push_back("data.on_bad_sample=skip");
  CHECK(t.run(skipping, "auto") == 0);
  CHECK_THAT(t.text("run/log.txt"), Contains("bad sample"));
}
