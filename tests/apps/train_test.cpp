// mesa-train and mesa-eval as a user runs them: files, numbers, options and exit codes.
#include <algorithm>

#include "apps/tiny_run.h"
#include "mesa/base/cuda.h"
#include "support/paths.h"

using namespace mesa::testing;
namespace cuda = mesa::cuda;
using Catch::Matchers::Contains;

TEST_CASE("apps: a run leaves every file, and they agree") {
  const TinyRun tiny;
  const ProcessResult trained = tiny.train();
  INFO(trained.err);
  REQUIRE(trained.code == 0);
  for (const char* file : {"config.yaml", "summary.csv", "metrics.jsonl", "memory.csv", "summary.json", "log.txt",
                           "checkpoints/last/model.safetensors", "checkpoints/best/model.safetensors"})
    CHECK(tiny.exists(std::string("run/") + file));

  const auto rows = read_csv(tiny.path("run/summary.csv"));
  REQUIRE(rows.size() == 3);
  CHECK(rows[0] == Args{"epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr", "images_per_second",
                        "activation_bytes_per_image", "peak_bytes", "seconds", "step", "eval_loss_ema", "eval_top1_ema", "eval_top5_ema"});
  const Json summary = tiny.json("run/summary.json");
  CHECK(summary.size() == 17);
  CHECK(summary["train_loss"] == std::stod(rows[2][1]));
  CHECK(summary["eval_loss"] == std::stod(rows[2][2]));
  CHECK(summary["top1"] == std::stod(rows[2][3]));
  CHECK(summary["top5"] == std::stod(rows[2][4]));
  CHECK(summary["activation_bytes_per_image"] == std::stod(rows[2][7]));
  CHECK(summary["peak_bytes"] == std::stoll(rows[2][8]));
  CHECK(summary["epochs"] == 2);
  CHECK(summary["steps"] == 12);
  CHECK(summary["storage"] == "int8");
  CHECK(summary["device"] == "cpu");
  CHECK(summary["exact_activation_bytes_per_image"] > summary["activation_bytes_per_image"]);

  SECTION("memory.csv adds up to what the meter saw") {
    std::istringstream lines(read_text(tiny.path("run/memory.csv")));
    std::string line;
    std::getline(lines, line);
    CHECK(line == "site,shape,codec,exact_bytes,kept_bytes,saturated");
    int64_t kept = 0;
    while (std::getline(lines, line)) {
      line.resize(line.rfind(','));  // the last column is the share that saturated
      kept += std::stoll(line.substr(line.rfind(',') + 1));
    }
    CHECK(static_cast<double>(kept) == 16 * summary["activation_bytes_per_image"].get<double>());
  }
  SECTION("the steady state takes no more memory") {
    const auto metrics = tiny.metrics("run");
    REQUIRE(metrics.size() == 12);
    CHECK(metrics[2]["peak_bytes"] == metrics.back()["peak_bytes"]);
  }
  SECTION("mesa-eval finds the same, from the checkpoint alone") {
    const ProcessResult last = tiny.eval({"run/checkpoints/last", "--json", "last.json"});
    INFO(last.err);
    REQUIRE(last.code == 0);
    CHECK_THAT(last.out, Contains("top-1") && Contains("top-5") && Contains("32 images"));
    CHECK(tiny.json("last.json")["top1"] == summary["top1"]);
    CHECK(tiny.json("last.json")["top5"] == summary["top5"]);
    CHECK(tiny.json("last.json")["loss"].get<double>() == Approx(summary["eval_loss"].get<double>()).epsilon(1e-6));
    REQUIRE(tiny.eval({"run", "--batch-size", "5", "--json", "best.json"}).code == 0);
    const double best = std::max(std::stod(rows[1][3]), std::stod(rows[2][3]));
    CHECK(tiny.json("best.json")["top1"] == best);
  }
  SECTION("config.yaml gives the same run again") {
    REQUIRE(tiny.call("mesa-train", {"--config", "run/config.yaml", "--output", "again", "--quiet"}).code == 0);
    CHECK(tiny.curve("again") == tiny.curve("run"));
    const std::string file = "/checkpoints/last/model.safetensors";
    CHECK(read_text(tiny.path("again" + file)) == read_text(tiny.path("run" + file)));
  }
  SECTION("a finished run says so and stays as it is") {
    const ProcessResult again = tiny.train({}, "run", {"--resume"});
    CHECK(again.code == 0);
    CHECK_THAT(again.err, Contains("finished already"));
    CHECK(tiny.json("run/summary.json") == summary);
    CHECK(read_csv(tiny.path("run/summary.csv")) == rows);
    CHECK(tiny.metrics("run").size() == 12);
  }
  SECTION("without --resume a run's folder is not overwritten") {
    const ProcessResult again = tiny.train();
    CHECK(again.code == 1);
    CHECK_THAT(again.err, Contains("holds a run already") && Contains("--resume"));
    CHECK(tiny.json("run/summary.json") == summary);
  }
  SECTION("a resumed run may take another storage policy, and says what changed") {
    const ProcessResult longer = tiny.train({"train.epochs=3", "storage=mesa"}, "run", {"--resume"});
    CHECK(longer.code == 0);
    CHECK_THAT(longer.err, Contains("train.epochs (was 2)") && Contains("storage (was int8)"));
    CHECK(read_csv(tiny.path("run/summary.csv")).size() == 4);
  }
}

TEST_CASE("apps: a run may begin with the weights of another") {
  const TinyRun t;
  REQUIRE(t.train({}, "first").code == 0);
  const ProcessResult second = t.train({"train.weights=first", "model.image_size=24", "train.epochs=1"}, "second");
  INFO(second.err);
  CHECK(second.code == 0);
  CHECK_THAT(second.out + second.err, Contains("started from ") && Contains("resized pos_embed [1, 4, 24] to [1, 9, 24]"));
  const ProcessResult wrong = t.train({"train.weights=first", "model.width=48"}, "third");
  CHECK(wrong.code == 2);
  CHECK_THAT(wrong.err, Contains("--set train.weights=first: train.weights: ") && Contains("belongs to another model"));
}

TEST_CASE("apps: a run with a moving average judges, saves and evaluates by it") {
  const TinyRun tiny;
  const Args sets{"optimizer.name=lamb",   "optimizer.lr=0.01",         "train.epochs=4",           "train.ema_decay=0.8",
                  "train.ema_warmup=true", "optimizer.layer_decay=0.8", "optimizer.lr_base_batch=8"};
  const ProcessResult trained = tiny.train(sets);
  INFO(trained.err);
  REQUIRE(trained.code == 0);
  CHECK_THAT(trained.err, Contains("optimizer: lamb, learning rate 0.02 (0.01 * 16 images an update / 8), cosine; weight decay 0.05 on ") &&
                              Contains("layer decay 0.8: the layers learn at 0.64 to 1 times that rate") &&
                              Contains("moving average of the weights with decay 0.8 after a warm-up") &&
                              Contains("with averaged weights"));
  const auto rows = read_csv(tiny.path("run/summary.csv"));
  REQUIRE(rows.size() == 5);
  double best = 0;
  for (size_t i = 1; i < rows.size(); ++i) best = std::max(best, std::stod(rows[i][12]));
  CHECK(rows[1][11] != rows[1][2]);
  const Json summary = tiny.json("run/summary.json"), state = tiny.json("run/checkpoints/last/state.json");
  CHECK(summary["top1_ema"] == std::stod(rows[4][12]));
  CHECK(summary["eval_loss_ema"] == std::stod(rows[4][11]));
  CHECK(state["ema_updates"] == 24);
  CHECK(state["optimizer"] == "lamb");
  CHECK(state["best_top1"] == best);

  const auto evaluated = [&](const Args& args) {
    Args all = args;
    all.insert(all.end(), {"--json", "e.json"});
    const ProcessResult result = tiny.eval(all);
    INFO(result.err);
    REQUIRE(result.code == 0);
    return tiny.json("e.json");
  };
  const std::string last = "run/checkpoints/last";
  const Json ema = evaluated({last, "--weights", "ema"}), raw = evaluated({last, "--weights", "raw"}), automatic = evaluated({last});
  CHECK(ema["top1"] == summary["top1_ema"]);
  CHECK(ema["weights"] == "ema");
  CHECK(ema["loss"].get<double>() == Approx(summary["eval_loss_ema"].get<double>()).epsilon(1e-6));
  CHECK(raw["top1"] == summary["top1"]);
  CHECK(raw["loss"].get<double>() == Approx(summary["eval_loss"].get<double>()).epsilon(1e-6));
  CHECK(automatic["loss"] == ema["loss"]);
  CHECK(evaluated({"run"})["top1"] == best);
  CHECK(evaluated({last + "/ema.safetensors"})["loss"] == ema["loss"]);
  CHECK(evaluated({last + "/model.safetensors"})["loss"] == raw["loss"]);
  const ProcessResult file = tiny.eval({last + "/model.safetensors", "--weights", "ema"});
  CHECK(file.code == 1);
  CHECK_THAT(file.err, Contains("is a file"));

  CHECK_THAT(tiny.train({"train.weights=run", "train.epochs=1"}, "second").err,
             Contains("started from run/checkpoints/best/ema.safetensors"));
  const ProcessResult none = tiny.eval({"second", "--weights", "ema"});
  CHECK(none.code == 1);
  CHECK_THAT(none.err, Contains("has no moving average"));
}

TEST_CASE("apps: --dry-run trains nothing and predicts what the meter then finds") {
  const TinyRun tiny;
  const std::string storage = GENERATE("exact", "int8", "int2", "mesa");
  const std::string attention = GENERATE("fused", "explicit");
  Args sets{"storage=" + storage, "model.attention=" + attention, "train.epochs=1", "train.steps=3"};
  for (const char* set : {"model.width=48", "model.depth=2", "train.eval_batch_size=8"}) sets.push_back(set);
  CAPTURE(storage, attention);
  const ProcessResult plan = tiny.train(sets, "run", {"--dry-run"});
  INFO(plan.err);
  REQUIRE(plan.code == 0);
  CHECK_FALSE(tiny.exists("run"));
  CHECK_THAT(plan.out, Contains("model:\n") && Contains("classes: 10") && Contains("parameters ") && Contains("blocks.*.mlp.fc1:x"));
  const int64_t predicted = std::stoll(plan.out.substr(plan.out.find("predicted peak") + 14));
  REQUIRE(tiny.train(sets).code == 0);
  const Json summary = tiny.json("run/summary.json");
  const double peak = summary["peak_bytes"].get<double>();
  CHECK(std::abs(static_cast<double>(predicted) - peak) < 0.1 * peak);
  CHECK_THAT(plan.out, Contains("parameters        " + summary["parameters"].dump()));
  CHECK_THAT(plan.out, Contains("\noptimizer         adamw, learning rate 0.001, cosine; weight decay 0.05 on "));
}

TEST_CASE("apps: help and version") {
  const ProcessResult train = run("mesa-train", {"--help"}), eval = run("mesa-eval", {"--help"});
  CHECK(train.code == 0);
  CHECK(eval.code == 0);
  for (const char* option : {"--config", "--set", "--output", "--resume", "--device", "--dry-run", "--quiet", "--version", "75"})
    CHECK_THAT(train.out, Contains(option));
  for (const char* option : {"checkpoint", "--data", "--batch-size", "--json", "--set", "--version"})
    CHECK_THAT(eval.out, Contains(option));
  for (const char* program : {"mesa-train", "mesa-eval"}) {
    const ProcessResult version = run(program, {"--version"});
    CHECK(version.code == 0);
    CHECK_THAT(version.out, Contains("commit") && Contains("cuda"));
  }
}

TEST_CASE("apps: a GPU that is not to be had is one line and exit code 1") {
  if (cuda::available()) return;
  const TinyRun tiny;
  const ProcessResult result = tiny.train({}, "run", {"--device", "cuda"});
  CHECK(result.code == 1);
  CHECK_THAT(result.err, Contains("device cuda: " + cuda::unavailable()) && Contains("--device cpu"));
  CHECK(std::count(result.err.begin(), result.err.end(), '\n') == 1);
  CHECK_FALSE(tiny.exists("run"));
}

TEST_CASE("apps: a plan for a GPU needs none, and tells the largest batch for so much memory") {
  const TinyRun tiny;
  const auto largest = [&](const char* bytes) {
    const ProcessResult result = tiny.train({}, "run", {"--device", "cuda", "--dry-run", "--fit", bytes});
    CHECK(result.code == 0);
    const std::string says = "largest batch within ";
    REQUIRE_THAT(result.out, Contains(says));
    return std::stoll(result.out.substr(result.out.find(": ", result.out.find(says)) + 2));
  };
  CHECK(largest("1000") == 0);
  CHECK(largest("1e6") > 0);
  CHECK(largest("1e8") > 10 * largest("1e7") / 2);
  CHECK(tiny.train({}, "run", {"--fit", "1e9"}).code == 2);  // of a dry run only
}

TEST_CASE("apps: the models are listed with what they keep, as docs/models.md has them") {
  const TinyRun tiny;
  const ProcessResult result = tiny.call("mesa-train", {"--list-models"});
  CHECK(result.code == 0);
  const std::string docs = read_text(source_dir() + "/docs/models.md");
  std::istringstream lines(result.out);
  std::string line;
  std::getline(lines, line);  // the heads of the columns
  int models = 0;
  while (std::getline(lines, line) && !line.starts_with("GFLOPs")) {
    std::string name, parameters, flops, input, kept[3], unit[3];
    std::istringstream(line) >> name >> parameters >> flops >> input >> kept[0] >> unit[0] >> kept[1] >> unit[1] >> kept[2] >> unit[2];
    for (int at = static_cast<int>(parameters.size()) - 3; at > 0; at -= 3) parameters.insert(at, ",");
    std::string row = "| `" + name + "` | " + parameters + " | " + flops + " | " + input + " |";
    for (int i = 0; i < 3; ++i) row += " " + kept[i] + " " + unit[i] + " |";
    CHECK_THAT(docs, Contains(row));
    ++models;
  }
  CHECK(models > 20);
  for (const char* text : {"deit_small_patch16_224", "22050664", "deit3_huge_patch14_224", "vit_large_patch16_384", "_distilled_"})
    CHECK_THAT(result.out, Contains(text));
}

TEST_CASE("apps: wrong usage ends with 2 and one line that names the place") {
  const TinyRun tiny;
  tiny.write("typo.yaml", "model: {name: vit}\ntrain:\n  epochz: 3\n");
  struct Case {
    Args args, says;
  };
  const std::vector<Case> cases{
      {{}, {"--config is needed"}},
      {{"--nonsense"}, {"--nonsense"}},
      {{"--config", "absent.yaml"}, {"absent.yaml"}},
      {{"--config", "typo.yaml"}, {"typo.yaml:3", "epochz", "epochs"}},
      {{"--config", "tiny.yaml", "--resume"}, {"--output"}},
      {{"--config", "tiny.yaml", "--device", "tpu"}, {"--device"}},
      {tiny.train_args({"train.epochs=0"}), {"train.epochs", "at least 1"}},
      {tiny.train_args({"train.batch_size=97"}), {"train.batch_size", "larger than the data set of 96"}},
      {tiny.train_args({"model.classes=4"}), {"model.classes", "10 classes"}},
      {tiny.train_args({"storage=[{match: \"*\", codec: int8}, {match: \"blocks.9.*\", codec: int4}]"}), {"blocks.9.*", "matches no site"}},
      {tiny.train_args({"storage=[{match: \"*\", codec: rebuild}]"}), {"rebuild"}},
      {tiny.train_args({"storage=[{match: \"*\", codec: int9}]"}), {"int9"}},
      {tiny.train_args({"model.attn_drop_rate=0.1"}), {"model.attn_drop_rate", "explicit"}},
      {tiny.train_args({"data.kind=cifar10"}), {"data.path"}},
  };
  for (const Case& c : cases) {
    const ProcessResult result = tiny.call("mesa-train", c.args);
    INFO(result.err);
    CHECK(result.code == 2);
    for (const std::string& text : c.says) CHECK_THAT(result.err, Contains(text));
    CHECK_FALSE(tiny.exists("run"));
  }
}

TEST_CASE("apps: a config that says nothing of storage gets the shipped exact policy") {
  const TinyRun tiny;
  tiny.write("silent.yaml", "model: {name: vit, image_size: 16, patch_size: 8, width: 24, depth: 1, heads: 3}\ndata: {kind: shapes}\n");
  const ProcessResult silent = tiny.call("mesa-train", {"--config", "silent.yaml", "--dry-run"});
  const ProcessResult exact = tiny.call("mesa-train", {"--config", "silent.yaml", "--dry-run", "--set", "storage=exact"});
  CHECK(silent.code == 0);
  CHECK(silent.out == exact.out);
}

TEST_CASE("apps: shipped configs go by their bare names") {
  const TinyRun tiny;
  for (const char* name : {"deit_s.yaml", "deit_s", "quickstart.yaml"}) {
    const ProcessResult plan = tiny.call("mesa-train", {"--config", name, "--dry-run", "--set", "data.path=/imagenet"});
    INFO(plan.err);
    CHECK(plan.code == 0);
  }
}

TEST_CASE("apps: files that cannot be used end with 1 and their name") {
  const TinyRun tiny;
  tiny.write("file", "text");
  const auto fails = [&](const ProcessResult& result, const Args& says) {
    INFO(result.err);
    CHECK(result.code == 1);
    CHECK_FALSE(result.timed_out);
    for (const std::string& text : says) CHECK_THAT(result.err, Contains(text));
  };
  fails(tiny.train({}, "file/run"), {"file"});
  fails(tiny.train({"data.kind=cifar10", "data.path=nowhere"}), {"nowhere"});
  fails(tiny.train({}, "run", {"--resume", "nowhere"}), {"no checkpoint at nowhere"});
  fails(tiny.eval({"nowhere"}), {"nowhere"});
  fails(tiny.eval({"file"}), {"file"});
  fails(tiny.eval({"."}), {"neither a checkpoint"});
}

TEST_CASE("apps: mesa-eval refuses data with other classes than the training's") {
  const TinyRun tiny;
  const auto picture = [&](const std::string& name) {
    const Bytes bytes = encode_png(test_image(16, 16, 3));
    std::filesystem::create_directories(std::filesystem::path(tiny.path(name)).parent_path());
    tiny.write(name, {bytes.begin(), bytes.end()});
  };
  for (const std::string part : {"train/", "val/"})
    for (const std::string file : {"1.png", "2.png"})
      for (const std::string name : {"cat/", "dog/"}) {
        picture("here/" + part + name + file);
        picture("there/" + part + (name == "cat/" ? "ant/" : name) + file);
      }
  const Args folder{"data.kind=image_folder", "data.path=here", "data.train_size=0", "data.test_size=0", "train.batch_size=2"};
  const ProcessResult trained = tiny.train(folder);
  INFO(trained.err);
  REQUIRE(trained.code == 0);
  CHECK_THAT(read_text(tiny.path("run/config.yaml")), Contains("classes: 2"));
  CHECK(tiny.eval({"run", "--data", "here"}).code == 0);
  const ProcessResult other = tiny.eval({"run", "--data", "there"});
  CHECK(other.code == 1);
  CHECK_THAT(other.err, Contains("class 0 was 'cat' and is 'ant'"));
}

TEST_CASE("apps: labels beyond the model's classes are refused") {
  const TinyRun tiny;
  const auto images = idx_bytes({40, 16, 16}, Bytes(40 * 256, 7)), labels = idx_bytes({40}, Bytes(40, 12));
  for (const std::string set : {"train", "t10k"}) {
    tiny.write(set + "-images-idx3-ubyte", {images.begin(), images.end()});
    tiny.write(set + "-labels-idx1-ubyte", {labels.begin(), labels.end()});
  }
  const ProcessResult result = tiny.train({"data.kind=idx", "data.path=.", "model.channels=1", "data.train_size=0", "data.test_size=0"});
  INFO(result.err);
  CHECK((result.code == 1 || result.code == 2));
  CHECK_THAT(result.err, Contains("12"));
}

TEST_CASE("apps: the quickstart reaches what it promises", "[slow]") {
  const TinyRun tiny;
  const Args args{"--config", "quickstart.yaml", "--output", "run"};
  const ProcessResult result = Process("mesa-train", args, {}, tiny.path(".")).finish(std::chrono::seconds(1500));
  INFO(result.err);
  REQUIRE(result.code == 0);
  CHECK(tiny.json("run/summary.json")["top1"].get<double>() >= 95);
}
