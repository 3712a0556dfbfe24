#include "mesa/train/config.h"

#include <catch2/catch.hpp>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "mesa/base/files.h"
#include "mesa/train/setup.h"
#include "support/paths.h"

using namespace mesa;
namespace fs = std::filesystem;
using Catch::Matchers::Contains;
using Catch::Matchers::StartsWith;

namespace {

struct Folder {  // a scratch folder with files, removed at the end
  fs::path path;
  Folder() {
    char name[] = "/tmp/mesa-config-XXXXXX";
    path = mkdtemp(name);
  }
  ~Folder() { fs::remove_all(path); }
  std::string file(const std::string& name, const std::string& text) const {
    const fs::path file = path / name;
    fs::create_directories(file.parent_path());
    std::ofstream(file) << text;
    return file.string();
  }
};

std::string error_of(const std::string& yaml, const std::vector<std::string>& overrides = {}) {
  try {
    parse_config(yaml, "run.yaml", overrides);
  } catch (const UsageError& e) {
    return e.what();
  }
  return "no error";
}

std::string load_error(const std::string& path, const std::vector<std::string>& overrides = {}) {
  try {
    load_config(path, overrides);
  } catch (const UsageError& e) {
    return e.what();
  }
  return "no error";
}

}  // namespace

TEST_CASE("config: values, defaults and their places") {
  const RunConfig c = parse_config(
      "model:\n  name: vit\n  width: 96\ntrain: {epochs: 3}\ndata:\n  mean: [0.5, 0.25]\n  std: [1, 2e-1]\nseed: 7\n", "a.yaml");
  CHECK(c.model.width == 96);
  CHECK_FALSE(c.model.depth.has_value());
  CHECK(c.train.epochs == 3);
  CHECK(c.data.mean == std::vector<double>{0.5, 0.25});
  CHECK(c.data.std == std::vector<double>{1, 0.2});
  CHECK(c.seed == 7);
  CHECK(c.train.batch_size == TrainConfig().batch_size);
  CHECK(c.where("model.width") == "a.yaml:3");
  CHECK(c.where("train.epochs") == "a.yaml:4");
  CHECK(c.where("train.batch_size") == "default");
  CHECK_THROWS_WITH(c.refuse("model.width", "no kernel for ", 96), "a.yaml:3: model.width: no kernel for 96");
}

TEST_CASE("config: colour jitter is a number, or three or four") {
  const RunConfig one = parse_config("data: {color_jitter: 0.4}\n", "a.yaml"),
                  four = parse_config("data: {color_jitter: [0.4, 0.3, 0.2, 0.1]}\n", "a.yaml");
  CHECK(one.data.color_jitter == std::vector<double>{0.4});
  CHECK_THAT(to_yaml(one), Contains("  color_jitter: 0.4\n"));
  CHECK_THAT(to_yaml(four), Contains("  color_jitter: [0.4, 0.3, 0.2, 0.1]\n"));
  CHECK(parse_config(to_yaml(four), "b.yaml") == four);
  CHECK(parse_config("data: {color_jitter: [0.4]}\n", "a.yaml") == one);
  CHECK(make_transform(one, {}).color_jitter == ColorJitter(0.4, 0.4, 0.4, 0));
  CHECK(make_transform(four, {}).color_jitter == ColorJitter(0.4, 0.3, 0.2, 0.1));
  CHECK(make_transform(parse_config("data: {color_jitter: [0.4, 0.3, 0.2]}\n", "a.yaml"), {}).color_jitter == ColorJitter(0.4, 0.3, 0.2, 0));
}

TEST_CASE("config: each kind of mistake is refused with its place") {
  struct Row {
    const char *yaml, *message;
  };
  const Row rows[] = {
      {"train:\n  epoch: 3\n", "run.yaml:2: unknown key 'train.epoch'; did you mean 'train.epochs'?"},
      {"trian:\n  epochs: 3\n", "run.yaml:1: unknown key 'trian'; did you mean 'train'?"},
      {"seed: 1\nlr: 3\n", "run.yaml:2: unknown key 'lr'; did you mean 'optimizer.lr'?"},
      {"train.epochs: 3\n", "run.yaml:1: the key 'train.epochs' is written nested"},
      {"train:\n  lr: 3\n", "run.yaml:2: unknown key 'train.lr'; did you mean 'optimizer.lr'?"},
      {"train:\n  epochs: three\n", "run.yaml:2: train.epochs: 'three' is not a whole number"},
      {"train:\n  epochs: 3.5\n", "run.yaml:2: train.epochs: '3.5' is not a whole number"},
      {"train:\n  epochs: \"3\"\n", "run.yaml:2: train.epochs: the quoted text \"3\" is not a whole number"},
      {"train:\n  epochs:\n", "run.yaml:2: train.epochs: has no value"},
      {"train:\n  epochs: [3]\n", "run.yaml:2: train.epochs: a list is not a whole number"},
      {"train:\n  epochs: 0\n", "run.yaml:2: train.epochs: must be at least 1 and at most 1e+06, not 0"},
      {"train:\n  batch_size: 0\n", "run.yaml:2: train.batch_size: must be at least 1"},
      {"train:\n  epochs: 99999999999999999999\n", "run.yaml:2: train.epochs: 99999999999999999999 is out of range"},
      {"optimizer:\n  lr: -0.1\n", "run.yaml:2: optimizer.lr: must be above 0, not -0.1"},
      {"optimizer:\n  lr: .nan\n", "run.yaml:2: optimizer.lr: must be finite, not .nan"},
      {"optimizer:\n  lr: inf\n", "run.yaml:2: optimizer.lr: must be finite, not inf"},
      {"optimizer:\n  lr: 1e999\n", "run.yaml:2: optimizer.lr: 1e999 is out of range"},
      {"optimizer:\n  lr: 1e30\n", "run.yaml:2: optimizer.lr: must be above 0 and at most 1e+15, not 1e30"},
      {"optimizer:\n  lr: fast\n", "run.yaml:2: optimizer.lr: 'fast' is not a number"},
      {"optimizer:\n  beta2: 1\n", "run.yaml:2: optimizer.beta2: must be at least 0 and below 1, not 1"},
      {"model:\n  drop_path: 1.5\n", "run.yaml:2: model.drop_path: must be at least 0 and below 1"},
      {"data:\n  flip: 1.5\n", "run.yaml:2: data.flip: must be at least 0 and at most 1"},
      {"model:\n  qkv_bias: yes\n", "run.yaml:2: model.qkv_bias: 'yes' is not true or false"},
      {"model:\n  attention: fusd\n", "run.yaml:2: model.attention: 'fusd' is not one of fused, explicit, cudnn; did you mean 'fused'?"},
      {"data:\n  kind: imagefolder\n", "did you mean 'image_folder'?"},
      {"data:\n  mean: 0.5\n", "run.yaml:2: data.mean: '0.5' where a list is needed"},
      {"data:\n  mean: [a]\n", "run.yaml:2: data.mean: 'a' is not a number"},
      {"data:\n  mean: [0.5]\n", "run.yaml:2: data.mean: 1 means but 0 standard deviations"},
      {"data:\n  mean: [0.5]\n  std: [0]\n", "run.yaml:3: data.std: must be above 0"},
      {"model:\n  channels: 3\ndata:\n  mean: [0.5]\n  std: [1]\n", "run.yaml:4: data.mean: 1 means for images of 3 channels"},
      {"data:\n  crop_scale: [0.1, 0.2, 0.3]\n", "run.yaml:2: data.crop_scale: needs 2 values, not 3"},
      {"data:\n  crop_scale: [0.5, 0.2]\n", "run.yaml:2: data.crop_scale: needs [smallest, largest]"},
      {"data:\n  color_jitter: [0.1, 0.2]\n",
       "run.yaml:2: data.color_jitter: needs a number, [brightness, contrast, saturation], or these and the hue, not 2 values"},
      {"data:\n  color_jitter: [0.1, 0.2, 0.3, 0.6]\n", "run.yaml:2: data.color_jitter: a hue is turned by at most 0.5, not 0.6"},
      {"data:\n  color_jitter: 1.5\n", "run.yaml:2: data.color_jitter: must be at least 0 and at most 1"},
      {"data:\n  augment: rand-m9-x1\n", "run.yaml:2: data.augment: 'rand-m9-x1': unknown part 'x1'; parts are m, mstd"},
      {"data:\n  augment: autoaugment\n", "run.yaml:2: data.augment: must be empty, 3a or rand-..., such as rand-m9-mstd0.5-inc1"},
      {"data:\n  erasing_mode: noise\n", "run.yaml:2: data.erasing_mode: 'noise' is not one of const, rand, pixel"},
      {"data:\n  repeats: 0\n", "run.yaml:2: data.repeats: must be at least 1"},
      {"data:\n  erasing: 2\n", "run.yaml:2: data.erasing: must be at least 0 and at most 1"},
      {"model:\n  width: 100\n  heads: 3\n", "run.yaml:2: model.width: a width of 100 cannot be divided among 3 heads"},
      {"model:\n  image_size: 30\n  patch_size: 4\n",
       "run.yaml:2: model.image_size: an image of 30 pixels cannot be cut into patches of 4"},
      {"data:\n  train_size: 10\ntrain:\n  batch_size: 64\n",
       "run.yaml:4: train.batch_size: a batch of 64 is larger than the data set of 10"},
      {"optimizer:\n  nesterov: true\n",
       "run.yaml:2: optimizer.nesterov: is nothing that adamw has; leave it out (or set it to null), or set optimizer.name to sgd"},
      {"optimizer:\n  name: sgd\n  beta1: 0.9\n",
       "run.yaml:3: optimizer.beta1: is nothing that sgd has; leave it out (or set it to null), or set optimizer.name to adamw or lamb"},
      {"optimizer:\n  trust_clip: false\n", "run.yaml:2: optimizer.trust_clip: is nothing that adamw has"},
      {"optimizer: {name: lamb,\n  momentum: 0.9}\n", "run.yaml:2: optimizer.momentum: is nothing that lamb has"},
      {"optimizer: {name: sgd, momentum: 0,\n  nesterov: true}\n",
       "run.yaml:2: optimizer.nesterov: needs a momentum, and optimizer.momentum is 0"},
      {"optimizer:\n  name: sdg\n", "run.yaml:2: optimizer.name: 'sdg' is not one of adamw, sgd, lamb; did you mean 'sgd'?"},
      {"optimizer:\n  layer_decay: 1.1\n", "run.yaml:2: optimizer.layer_decay: must be above 0 and at most 1, not 1.1"},
      {"optimizer:\n  layer_decay: 0\n", "run.yaml:2: optimizer.layer_decay: must be above 0 and at most 1, not 0"},
      {"schedule:\n  decay_rate: 0.5\n",
       "run.yaml:2: schedule.decay_rate: is nothing that cosine has; leave it out (or set it to null), or set schedule.name to step"},
      {"train:\n  ema_decay: 1\n", "run.yaml:2: train.ema_decay: must be at least 0 and below 1, not 1"},
      {"train:\n  ema_warmup: true\n", "run.yaml:2: train.ema_warmup: needs an average: set train.ema_decay"},
      {"optimizer:\n  lr: 1e-4\nschedule:\n  min_lr: 1e-3\n", "run.yaml:4: schedule.min_lr: 0.001 is above optimizer.lr"},
      {"train: 5\n", "run.yaml:1: train: is a section of keys, not '5'"},
      {"train:\n  epochs: 1\n  epochs: 2\n", "run.yaml:3: the key 'epochs' is given twice (first in line 2)"},
      {"train: {}\ntrain: {}\n", "run.yaml:2: the key 'train' is given twice"},
      {"", "run.yaml: is empty"},
      {"# nothing\n", "run.yaml: is empty"},
      {"just text\n", "run.yaml:1: a config is a mapping of keys, not 'just text'"},
      {"- a\n- b\n", "run.yaml:1: a config is a mapping of keys, not a list"},
      {"train:\n  epochs: [3\n", "not valid YAML"},
      {"train:\n\tepochs: 3\n", "run.yaml:2: not valid YAML"},
      {"seed: 1\n---\nseed: 2\n", "more than one YAML document"},
      {"[a]: 1\n", "a key must be plain text, not a list"},
      {"seed: !!binary 1\n", "YAML tag"},
      {"base: other.yaml\n", "run.yaml:1: base: cannot be followed from a text"},
      {"storage: int8\n", "run.yaml:1: storage: the rules are needed here, not the name 'int8'"},
      {"storage: []\n", "run.yaml:1: storage: the list of rules is empty"},
      {"storage:\n  - int8\n", "run.yaml:2: storage: a rule is a mapping"},
      {"storage:\n  - {match: \"*\"}\n", "run.yaml:2: storage: a rule needs 'codec'"},
      {"storage:\n  - {macth: \"*\", codec: int8}\n", "storage: a rule needs 'match' ('macth' is not it)"},
      {"storage:\n  - {match: \"*\", codec: int8, decay: 1.0}\n",
       "run.yaml:2: storage: decay must be a number of at least 0 and below 1, not '1.0'"},
      {"storage:\n  - {match: \"*\", codec: int8, groups: -2}\n", "storage: groups must be"},
      {"storage:\n  - {match: \"*\", codec: int8, range: runing}\n", "storage: range must be running or current"},
      {"storage:\n  - {match: \"*\", codec: int8, rounding: up}\n", "storage: rounding must be"},
      {"storage:\n  - {match: \"*\", codec: int8, groups: [1]}\n", "storage: groups needs one plain value"},
      {"storage: {rule: []}\n", "storage: unknown key 'rule'"},
  };
  for (const Row& row : rows) {
    INFO(row.yaml);
    CHECK_THAT(error_of(row.yaml), Contains(row.message));
  }
}

TEST_CASE("config: hostile texts end quickly in an error") {
  CHECK_THAT(error_of(std::string(100'000, '[')), Contains("run.yaml"));
  CHECK_THAT(error_of("train: " + std::string(20, '[') + std::string(20, ']')), Contains("nested deeper than"));
  CHECK_THAT(error_of(std::string(2 << 20, 'a')), Contains("larger than"));
  std::string bomb = "a: &a0 [x, x, x, x, x, x, x, x, x, x]\n";
  for (int i = 1; i < 9; ++i) {
    const std::string old = "*a" + std::to_string(i - 1);
    bomb += "b" + std::to_string(i) + ": &a" + std::to_string(i) + " [" + old;
    for (int j = 0; j < 9; ++j) bomb += ", " + old;
    bomb += "]\n";
  }
  CHECK_THAT(error_of(bomb), Contains("aliases expanded"));
  CHECK_THAT(error_of("train: &t {frozen: *t}\n"), StartsWith("run.yaml:1: "));
  std::string many;
  for (int i = 0; i < 40'000; ++i) many += "k" + std::to_string(i) + ": 1\n";
  CHECK_THAT(error_of(many), Contains("more than"));
  CHECK_THAT(error_of(std::string("train:\n  epochs: \0 3\n", 20)), StartsWith("run.yaml"));
}

TEST_CASE("config: an alias stands for its value") {
  CHECK(parse_config("data: {mean: &m [0.5], std: *m}\n", "a.yaml").data.std == std::vector<double>{0.5});
}

TEST_CASE("config: overrides win and name themselves in errors") {
  const std::string yaml = "train:\n  epochs: 3\nmodel: {width: 64}\n";
  const RunConfig c = parse_config(yaml, "a.yaml",
                                   {"train.epochs=5", "data.mean=[0.1, 0.2]", "data.std=[1, 1]", "model.width=null", "output=/tmp/a=b",
                                    "storage=[{match: \"*\", codec: int8}]"});
  CHECK(c.train.epochs == 5);
  CHECK(c.data.mean == std::vector<double>{0.1, 0.2});
  CHECK_FALSE(c.model.width.has_value());
  CHECK(c.output == "/tmp/a=b");
  CHECK(c.storage.name == "custom");
  CHECK(c.storage.rules.at(0).codec == "int8");
  CHECK(c.where("train.epochs") == "--set train.epochs=5");
  CHECK_THAT(error_of(yaml, {"train.epoch=5"}), Contains("--set train.epoch=5: unknown key 'train.epoch'; did you mean 'train.epochs'?"));
  CHECK_THAT(error_of(yaml, {"train.epochs=x"}), Contains("--set train.epochs=x: train.epochs: 'x' is not a whole number"));
  CHECK_THAT(error_of(yaml, {"train.epochs="}), Contains("has no value"));
  CHECK_THAT(error_of(yaml, {"train.epochs"}), Contains("write it as key.path=value"));
  CHECK_THAT(error_of(yaml, {"train..epochs=3"}), Contains("empty component"));
  CHECK_THAT(error_of(yaml, {".=3"}), Contains("empty component"));
  CHECK_THAT(error_of(yaml, {"train=3"}), Contains("is a section of keys"));
  CHECK_THAT(error_of(yaml, {"train.epochs=[1"}), StartsWith("--set train.epochs=[1: "));
  CHECK_THAT(error_of(yaml, {"output=\"x"}), Contains("--set output=\"x: not valid YAML"));
  CHECK_THAT(error_of(yaml, {"base=a.yaml"}), Contains("base: is allowed only"));
}

TEST_CASE("config: bases merge in order, relative to the including file") {
  const Folder dir;
  dir.file("common/one.yaml", "train: {epochs: 1, batch_size: 8}\nstorage: [{match: a, codec: int8}, {match: b, codec: int4}]\n");
  dir.file("common/two.yaml", "base: one.yaml\ntrain: {epochs: 2}\noptimizer: {lr: 0.5}\n");
  const std::string path =
      dir.file("run.yaml", "base: [common/two.yaml]\ntrain:\n  label_smoothing: 0.1\noptimizer:\nstorage: [{match: c, codec: bf16}]\n");
  const RunConfig c = load_config(path);
  CHECK(c.train.epochs == 2);
  CHECK(c.train.batch_size == 8);
  CHECK(c.train.label_smoothing == 0.1);
  CHECK(c.optimizer.lr == 0.5);
  REQUIRE(c.storage.rules.size() == 1);
  CHECK(c.storage.rules[0].match == "c");
  CHECK(c.storage.rules[0].where == path + ":5");
  CHECK(c.where("train.batch_size") == (dir.path / "common/one.yaml").string() + ":1");

  const std::string self = dir.file("self.yaml", "seed: 1\nbase: ./self.yaml\n");
  CHECK_THAT(load_error(self), Contains("self.yaml:2: base: ") && Contains("includes itself"));
  dir.file("x.yaml", "base: y.yaml\n");
  dir.file("y.yaml", "base: x.yaml\n");
  CHECK_THAT(load_error((dir.path / "x.yaml").string()), Contains("includes itself"));
  CHECK_THAT(load_error(dir.file("gone.yaml", "base: nowhere.yaml\n")),
             Contains("gone.yaml:1: there is no config 'nowhere.yaml'; looked for"));
  CHECK_THAT(load_error(dir.file("bad.yaml", "base: {a: 1}\n")), Contains("base: needs the name of a file"));
  CHECK_THAT(load_error(dir.file("nested.yaml", "train: {base: one.yaml}\n")), Contains("nested.yaml:1: unknown key 'train.base'"));
  for (int i = 0; i < 10; ++i)  // a diamond that would double at each level
    dir.file(concat("d", i, ".yaml"), i == 0 ? "seed: 1\n" : concat("base: [d", i - 1, ".yaml, d", i - 1, ".yaml]\n"));
  CHECK_THAT(load_error((dir.path / "d9.yaml").string()), Contains("more than 64 files"));
}

TEST_CASE("config: files that are missing, empty or no config") {
  const Folder dir;
  const std::string missing = (dir.path / "none.yaml").string();
  CHECK_THAT(load_error(missing), Contains("there is no config") && Contains(missing));
  CHECK_THAT(load_error("no_such_recipe"), Contains("no_such_recipe.yaml"));
  CHECK_THAT(load_error(dir.path.string()), Contains("there is no config"));
  CHECK_THAT(load_error(dir.file("empty.yaml", "")), Contains("empty.yaml: is empty"));
  CHECK_THAT(load_error(dir.file("list.yaml", "- 1\n")), Contains("list.yaml:1: a config is a mapping"));
  CHECK_THAT(load_error("/dev/zero"), Contains("larger than"));
}

TEST_CASE("config: names are looked up in the roots") {
  const Folder dir;
  dir.file("recipes/mine.yaml", "train: {epochs: 4}\nstorage: soft\n");
  dir.file("storage/soft.yaml",
           "# comment\nstorage:\n  - {match: \"*\", codec: int8, groups: heads, range: running, decay: 0.9, rounding: stochastic}\n");
  dir.file("storage/bare.yaml", "- {match: \"*\", codec: bf16}\n");
  dir.file("storage/bad.yaml", "storge:\n  - {match: \"*\", codec: bf16}\n");
  const char* old = std::getenv("MESA_CONFIG_DIR");
  const std::string before = old ? old : "";
  setenv("MESA_CONFIG_DIR", ("/nonexistent:" + dir.path.string()).c_str(), 1);
  const RunConfig c = load_config("mine");
  CHECK(load_config("mine.yaml") == c);
  CHECK(load_config("recipes/mine") == c);
  CHECK(c.train.epochs == 4);
  CHECK(c.storage.name == "soft");
  CHECK(c.storage.rules.at(0).options.at("decay") == "0.9");
  CHECK(c.storage.rules.at(0).where == (dir.path / "storage/soft.yaml").string() + ":3");
  CHECK(load_storage("bare").rules.at(0).codec == "bf16");
  CHECK(load_storage((dir.path / "storage/bare.yaml").string()).name == "bare");
  CHECK(load_config("mine", {"storage=bare"}).storage.name == "bare");
  CHECK_THAT(load_error("mine", {"storage=hard"}), Contains("--set storage=hard: there is no config 'hard'"));
  CHECK_THAT(load_error("mine", {"storage=bad"}), Contains("bad.yaml:1: unknown key 'storge'"));
  if (old)
    setenv("MESA_CONFIG_DIR", before.c_str(), 1);
  else
    unsetenv("MESA_CONFIG_DIR");
}

TEST_CASE("config: what an optimizer's keys are where they are not given, and null takes one back") {
  const auto of = [](const std::vector<std::string>& sets) { return parse_config("optimizer: {beta2: 0.95}\n", "o.yaml", sets).optimizer; };
  CHECK(with_defaults(of({})).beta1 == 0.9);
  CHECK(with_defaults(of({})).beta2 == 0.95);
  CHECK(with_defaults(of({})).eps == 1e-8);
  CHECK(with_defaults(of({"optimizer.name=lamb"})).eps == 1e-6);
  CHECK(with_defaults(of({"optimizer.name=lamb"})).trust_clip == false);
  const OptimizerConfig sgd = with_defaults(of({"optimizer.name=sgd", "optimizer.beta2=null", "optimizer.nesterov=true"}));
  CHECK(sgd.momentum == 0.9);
  CHECK(sgd.nesterov == true);
  CHECK_FALSE(sgd.eps.has_value());
  CHECK_THAT(error_of("optimizer: {beta2: 0.95}\n", {"optimizer.name=sgd"}),
             StartsWith("run.yaml:1: optimizer.beta2: is nothing that sgd has"));
}

TEST_CASE("config: what is written reads back equal") {
  RunConfig c;
  CHECK(parse_config(to_yaml(c), "w") == c);
  c.optimizer.name = "sgd", c.optimizer.momentum = 0.5, c.optimizer.no_decay = {"head.*"}, c.optimizer.layer_decay = 0.75;
  c.optimizer.lr_base_batch = 512, c.schedule.name = "step", c.schedule.decay_epochs = 2.5, c.train.ema_decay = 0.99996;
  c.model.width = 96;
  c.model.mlp_ratio = 0.1 + 0.2;
  c.model.pool = "mean";
  c.model.qkv_bias = false;
  c.model.distilled = true;
  c.model.registers = 4;
  c.model.layer_scale = 1e-6;
  c.optimizer.lr = 1.0 / 3;
  c.data.path = "/data/with space: and \"quotes\" \\ # \t\n\x01 \xc3\xa9";
  c.data.mean = {1.0 / 7, 0};
  c.data.std = {1e-30, 5};
  c.train.frozen = {"blocks.*", "null", "", "- x", "123", "~"};
  c.train.force_precision = true;
  c.seed = 123456789012345678;
  c.output = "true";
  c.storage = {"my policy", {{"*:x", "int8", {{"groups", "heads"}, {"decay", "0.90"}}, "here"}, {"blocks.0.*", "exact", {}, ""}}};
  const RunConfig again = parse_config(to_yaml(c), "w");
  CHECK(again == c);
  CHECK(to_yaml(again) == to_yaml(c));
}

TEST_CASE("config: docs/config.md has the table of keys") {
  CHECK_THAT(read_text(testing::source_dir() + "/docs/config.md"), Contains(config_reference()));
}

TEST_CASE("config: every shipped config loads and survives writing") {
  const char* old = std::getenv("MESA_CONFIG_DIR");
  const std::string before = old ? old : "";
  if (!old) setenv("MESA_CONFIG_DIR", (testing::source_dir() + "/configs").c_str(), 1);
  int loaded = 0;
  for (const auto& entry : fs::recursive_directory_iterator(testing::source_dir() + "/configs")) {
    const fs::path path = entry.path();
    if (path.extension() != ".yaml") continue;
    INFO(path);
    if (path.parent_path().filename() == "storage") {
      CHECK_NOTHROW(load_storage(path.stem().string()));
    } else {
      RunConfig c;
      CHECK_NOTHROW(c = load_config(path.string()));
      CHECK(parse_config(to_yaml(c), "written") == c);
    }
    ++loaded;
  }
  CHECK(loaded >= 12);
  CHECK(load_config("deit_s", {"data.path=/imagenet"}).model.name == "deit_small_patch16_224");
  if (!old) unsetenv("MESA_CONFIG_DIR");
}
