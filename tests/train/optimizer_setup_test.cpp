// From a config to its optimizer and learning rates.
#include "mesa/train/optimizer_setup.h"

#include <catch2/catch.hpp>
#include <cmath>

#include "mesa/train/setup.h"

using namespace mesa;
using Catch::Matchers::Contains;

namespace {

RunConfig config_of(const std::vector<std::string>& sets) {
  return parse_config("model: {name: vit, image_size: 16, patch_size: 8, width: 24, depth: 2, heads: 3, classes: 4}\n", "s.yaml", sets);
}

struct Made {
  RunConfig config;
  BuiltModel model;
  std::unique_ptr<Optimizer> optimizer;
  explicit Made(const std::vector<std::string>& sets)
      : config(config_of(sets)), model(config, model_config(config, 4), kMeta), optimizer(make_optimizer(config, model.params)) {}
  Param& at(const char* name) { return model.params.at(name); }
};

}  // namespace

TEST_CASE("optimizer setup: the optimizer that the config names") {
  for (const char* name : {"adamw", "sgd", "lamb"}) CHECK(std::string(Made({concat("optimizer.name=", name)}).optimizer->name()) == name);
  CHECK(Made({"optimizer.name=sgd"}).optimizer->state().count("head.bias/momentum_buffer") == 1);
  CHECK(Made({"optimizer.name=sgd", "optimizer.momentum=0"}).optimizer->state().empty());
}

TEST_CASE("optimizer setup: what has no weight decay, and the layers' learning rates") {
  Made plain({});
  CHECK(plain.at("head.weight").decay);
  CHECK_FALSE(plain.at("head.bias").decay);
  CHECK(plain.at("pos_embed").lr_scale == 1);
  Made made({"optimizer.no_decay=[head.*, blocks.0.attn.*]", "optimizer.layer_decay=0.5"});
  CHECK_FALSE(made.at("head.weight").decay);
  CHECK_FALSE(made.at("blocks.0.attn.qkv.weight").decay);
  CHECK(made.at("blocks.1.attn.qkv.weight").decay);
  CHECK(made.at("head.weight").lr_scale == 1);
  CHECK(made.at("blocks.1.attn.qkv.weight").lr_scale == 0.5);
  CHECK(made.at("pos_embed").lr_scale == 0.125);
  CHECK_THROWS_AS(Made({"optimizer.no_decay=[haed.*]"}), UsageError);
  CHECK_THROWS_WITH(Made({"optimizer.no_decay=[haed.*]"}),
                    Contains("optimizer.no_decay: ") && Contains("no parameter matches 'haed.*'") && Contains("weight decay"));
}

TEST_CASE("optimizer setup: learning rates from the images of an update") {
  const std::vector<std::string> sets{"optimizer.lr=5e-4", "schedule.warmup_lr=5e-7", "schedule.min_lr=5e-6", "schedule.warmup_epochs=5",
                                      "train.epochs=300",  "train.batch_size=128",    "train.accumulation=8"};
  const auto with = [&](const char* base) {
    std::vector<std::string> all = sets;
    all.push_back(concat("optimizer.lr_base_batch=", base));
    return make_schedule(config_of(all), 1251);
  };
  const Schedule off = with("0"), deit = with("512");
  CHECK(off.lr == 5e-4);
  CHECK(off.at(0) == 5e-7);
  CHECK(deit.lr == Approx(1e-3));
  CHECK(deit.at(0) == Approx(1e-6));
  CHECK(deit.at(5 * 1251) == Approx(1e-3));
  CHECK(deit.at(300 * 1251) == Approx(1e-5));
  CHECK(with("256").lr == Approx(2e-3));
}

TEST_CASE("optimizer setup: the schedules' lengths in updates") {
  const Schedule step = make_schedule(config_of({"schedule.name=step", "schedule.decay_epochs=2.5", "schedule.decay_rate=0.5"}), 10);
  CHECK(step.kind == Schedule::Kind::step);
  CHECK(step.decay_steps == 25);
  CHECK(step.at(24) == 1e-3);
  CHECK(step.at(25) == 5e-4);
  const Schedule usual = make_schedule(config_of({"schedule.name=step"}), 10);
  CHECK(usual.decay_steps == 300);
  CHECK(usual.at(300) == Approx(1e-4));
  CHECK(make_schedule(config_of({"schedule.name=step", "schedule.decay_epochs=1e-9"}), 10).decay_steps == 1);
  CHECK(make_schedule(config_of({"schedule.name=step", "schedule.decay_epochs=1e15"}), 1000000).at(7) == 1e-3);
  CHECK(make_schedule(config_of({"schedule.name=linear"}), 10).at(50) == Approx(5e-4));
  CHECK(make_schedule(config_of({"schedule.name=linear", "train.steps=20"}), 10).total_steps == 20);
}

TEST_CASE("optimizer setup: one line for the log") {
  Made made({"optimizer.lr_base_batch=32", "optimizer.layer_decay=0.5", "train.ema_decay=0.999", "optimizer.name=sgd",
             "train.frozen=[cls_token]"});
  CHECK_THAT(
      describe_optimizer(made.config, made.model.params),
      Contains("sgd, learning rate 0.002 (0.001 * 64 images an update / 32), cosine; weight decay 0.05 on 10 of 31 tensors; layer decay "
               "0.5: the layers learn at 0.125 to 1 times that rate; moving average of the weights with decay 0.999"));
  CHECK_THAT(describe_optimizer(Made({}).config, Made({}).model.params), !Contains("layer decay") && !Contains("average"));
}
