// Checkpoints: what is restored, what is refused, and what is left alone.
#include "mesa/train/checkpoint.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <filesystem>
#include <functional>
#include <map>
#include <sstream>

#include "mesa/base/files.h"
#include "mesa/kernels/elementwise.h"
#include "mesa/train/files.h"
#include "mesa/train/optimizer_setup.h"
#include "mesa/train/safetensors.h"
#include "support/data_files.h"
#include "train/checkpoint_parts.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;
namespace fs = std::filesystem;

namespace {

void no_warning(const std::string& text) { FAIL("unexpected: " << text); }

}  // namespace

TEST_CASE("checkpoint: every field of the state comes back, NaN too") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "last").string();
  Parts parts(config_of());
  TrainingState state;
  state.epoch = 3, state.batch = 7, state.step = 1234567890123, state.micro_step = 4, state.bad_steps = 5, state.bad_in_a_row = 2;
  state.epoch_loss = 0.1, state.interval_loss = 1e-300, state.best_top1 = 99.9, state.evaluated_step = 11;
  state.branch = 2, state.eval_loss = std::nan(""), state.train_loss = std::numeric_limits<double>::infinity(), state.peak_bytes = 1 << 30;
  parts.save(path, state);
  const TrainingState back = parts.load(path);
  CHECK(back.epoch == 3);
  CHECK(back.step == 1234567890123);
  CHECK(back.bad_in_a_row == 2);
  CHECK(back.epoch_loss == 0.1);
  CHECK(back.interval_loss == 1e-300);
  CHECK(back.best_top1 == 99.9);
  CHECK(back.evaluated_step == 11);
  CHECK(back.branch == 2);
  CHECK(std::isnan(back.eval_loss));
  CHECK(back.peak_bytes == 1 << 30);
}

namespace {

/// Rewrites a file of a checkpoint, which stays whole as a folder; `change` gets its text. A file left empty is removed.
void rewrite(const std::string& folder, const std::string& name, const std::function<std::string(const std::string&)>& change) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::directory_iterator(folder))
    if (entry.path().filename() != "manifest.json") files[entry.path().filename().string()] = read_text(entry.path().string());
  files.at(name) = change(files.at(name));
  write_folder_atomically(folder, [&](const std::string& at) {
    for (const auto& [file, text] : files) {
      if (text.empty()) continue;
      OutputFile out(at + "/" + file);
      out.write(text);
      out.close();
    }
  });
}

std::string without_lines(const std::string& text, const std::vector<std::string>& words) {
  std::string out;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);)
    if (std::none_of(words.begin(), words.end(), [&](const std::string& word) { return line.find(word) != std::string::npos; }))
      out += line + "\n";
  return out;
}

/// Takes some steps with made-up gradients.
void train(ParamStore& params, Optimizer& optimizer, Ema* ema) {
  for (int64_t t = 0; t < 3; ++t) {
    for (Param& p : params.params()) kernels::fill(p.grad, 0.1 * static_cast<double>(t + 1)), p.grad_written = true;
    optimizer.step(0.01);
    if (ema != nullptr) ema->update();
  }
}

}  // namespace

TEST_CASE("checkpoint: one from before there were other optimizers and averages still loads for AdamW") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "last").string();
  Parts parts(config_of());
  train(parts.model.params, parts.optimizer, nullptr);
  TrainingState state;
  state.step = 3;
  parts.save(path, state);
  rewrite(path, "state.json", [](const std::string& text) { return without_lines(text, {"\"optimizer\"", "_ema\""}); });
  CHECK_THAT(read_text(path + "/state.json"), !Contains("ema") && !Contains("adamw") && Contains("\"optimizer_steps\": 3"));
  Parts other(config_of());
  const TrainingState back = other.load(path);
  CHECK(back.step == 3);
  CHECK(std::isnan(back.eval_top1_ema));
  CHECK(other.optimizer.steps() == 3);
  const auto before = parts.optimizer.state();
  for (const auto& [name, moment] : other.optimizer.state()) CHECK(moment.to_vector<float>() == before.at(name).to_vector<float>());
  // What the config of that time spelled out is what is left out now.
  CHECK(changed_keys(config_of({"optimizer.beta1=0.9", "optimizer.beta2=0.999", "optimizer.eps=1e-8"}), config_of()).empty());
}

TEST_CASE("checkpoint: the state of another optimizer is refused with what to do") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "last").string();
  Parts parts(config_of());
  parts.save(path, {});
  const RunConfig config = config_of({"optimizer.name=sgd"});
  BuiltModel model(config, model_config(config, 4));
  StoragePolicy policy = make_policy(config.storage);
  const auto optimizer = make_optimizer(config, model.params);
  CHECK_THROWS_AS(load_checkpoint(path, config, model.params, *optimizer, policy), UsageError);
  CHECK_THROWS_WITH(
      load_checkpoint(path, config, model.params, *optimizer, policy),
      Contains("--set optimizer.name=sgd: optimizer.name: ") && Contains("was trained by adamw") && Contains("train.weights"));
}

TEST_CASE("checkpoint: averages come back with their count, begin where there are none, and are a model of their own") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "last").string();
  Parts parts(config_of({"train.ema_decay=0.9"}));
  const auto ema = make_ema(parts.config, parts.model.params), back = make_ema(parts.config, parts.model.params);
  train(parts.model.params, parts.optimizer, ema.get());
  const auto save = [&](const Ema* with) {
    save_checkpoint(path, parts.config, {"a", "b", "c", "d"}, parts.model.params, parts.optimizer, parts.policy, {}, with);
  };
  save(ema.get());
  const auto load = [&](Ema* into) {
    return load_checkpoint(path, parts.config, parts.model.params, parts.optimizer, parts.policy, into).average_begins;
  };
  CHECK_FALSE(load(back.get()));
  CHECK(back->updates() == 3);
  const auto averages = ema->state();
  for (const auto& [name, average] : back->state()) CHECK(average.to_vector<float>() == averages.at(name).to_vector<float>());
  const LoadedModel averaged = load_model(path), raw = load_model(path, WeightsKind::raw);
  CHECK(averaged.averaged);
  CHECK_FALSE(raw.averaged);
  CHECK(averaged.class_names == raw.class_names);
  CHECK(averaged.config == raw.config);
  CHECK(averaged.weights.at("head.weight").to_vector<float>() == averages.at("head.weight").to_vector<float>());
  CHECK(raw.weights.at("head.weight").to_vector<float>() == parts.model.params.at("head.weight").value.to_vector<float>());
  CHECK(raw.weights.at("head.weight").to_vector<float>() != averaged.weights.at("head.weight").to_vector<float>());
  CHECK_FALSE(load(nullptr));  // a run without an average leaves it
  save(nullptr);
  CHECK(load(back.get()));
  CHECK(back->updates() == 0);
  CHECK(back->state().at("head.weight").to_vector<float>() == raw.weights.at("head.weight").to_vector<float>());
  CHECK_THROWS_WITH(load_model(path, WeightsKind::ema), Contains("has no moving average"));
}

TEST_CASE("checkpoint: the same state writes the same bytes into any folder") {
  const TemporaryFolder folder;
  const auto at = [&](const char* name) { return (folder.path() / name).string(); };
  Parts a(config_of({"output=here"})), b(config_of({"output=there"}));
  a.save(at("a"), {}), b.save(at("b"), {});
  for (const char* file : {"/model.safetensors", "/state.safetensors", "/state.json", "/manifest.json"})
    CHECK(read_text(at("a") + file) == read_text(at("b") + file));
  CHECK(load_model(at("a")).class_names == std::vector<std::string>{"a", "b", "c", "d"});
}

TEST_CASE("checkpoint: another model, a bare file of weights and things that are no checkpoint are refused") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "last").string();
  Parts small(config_of()), wide(config_of({"model.width=48"})), deep(config_of({"model.depth=2"}));
  small.save(path, {});
  CHECK_THAT(error_of([&] { wide.load(path); }), Contains("another model") && Contains("24]") && Contains("48]"));
  CHECK_THAT(error_of([&] { deep.load(path); }), Contains("missing blocks.1.norm1.weight") && Contains("missing blocks.1.mlp.fc2.bias"));
  CHECK_THAT(error_of([&] { small.load(path + "/model.safetensors"); }), Contains("file of weights"));
  CHECK_THAT(error_of([&] { load_model(folder.path().string()); }), Contains("neither a checkpoint"));
  CHECK_THAT(error_of([&] { find_checkpoint("absent", "run", no_warning); }), Contains("no checkpoint at absent"));
  CHECK(find_checkpoint("auto", (folder.path() / "absent").string(), no_warning).empty());
  CHECK(find_checkpoint("", "run", no_warning).empty());
}

TEST_CASE("checkpoint: reading one removes nothing beside it") {
  const TemporaryFolder folder;
  const std::string run = (folder.path() / "run").string();
  Parts parts(config_of());
  parts.save(run + "/checkpoints/last", {});
  const std::vector<std::string> others{"run.old", "run.tmp", "run/checkpoints/last.tmp", "run/checkpoints/best.tmp"};
  for (const std::string& name : others) folder.write(name + "/file", {1});
  CHECK(resolve_checkpoint(run, "best") == run + "/checkpoints/last");
  load_model(run);
  for (const std::string& name : others) CHECK(fs::exists(folder.path() / name / "file"));
}

TEST_CASE("checkpoint: truncated at every 64th part and with any bit flipped it is refused, never read") {
  const TemporaryFolder folder;
  const std::string path = (folder.path() / "last").string();
  Parts parts(config_of());
  parts.save(path, {});
  for (const std::string file : {"/model.safetensors", "/state.safetensors", "/state.json", "/manifest.json"}) {
    const std::string whole = read_text(path + file);
    for (size_t i = 0; i < 64; ++i) {
      std::string cut = whole.substr(0, whole.size() * i / 64), flipped = whole;
      flipped[whole.size() * i / 64] ^= static_cast<char>(1 << (i % 8));
      for (const std::string& damaged : {cut, flipped}) {
        OutputFile out(path + file);
        out.write(damaged);
        out.close();
        CHECK_THROWS_AS(parts.load(path), Error);
      }
    }
    OutputFile out(path + file);
    out.write(whole);
    out.close();
  }
  CHECK_NOTHROW(parts.load(path));
}

TEST_CASE("checkpoint: changed keys are told apart from harmless ones") {
  const RunConfig then = config_of();
  CHECK(changed_keys(then, config_of({"output=x", "data.workers=7", "train.log_interval=3"})).empty());
  const auto changed = changed_keys(then, config_of({"train.epochs=77", "optimizer.lr=0.5", "storage=[{match: \"*\", codec: bf16}]"}));
  REQUIRE(changed.size() == 3);
  CHECK(changed[0] == std::pair<std::string, std::string>("train.epochs", "10"));
  CHECK(changed[1].first == "optimizer.lr");
  CHECK(changed[2] == std::pair<std::string, std::string>("storage", "exact"));
  LoadedRun loaded{{}, then};
  CHECK_NOTHROW(describe_changes(loaded, config_of({"seed=6"})));
  loaded.state.batch = 1;
  CHECK_THROWS_AS(describe_changes(loaded, config_of({"seed=6"})), UsageError);
}
