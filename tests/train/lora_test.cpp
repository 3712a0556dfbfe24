// LoRA in a run: what learns, what that saves, and factors merged into plain weights.
#include "mesa/train/lora.h"

#include <catch2/catch.hpp>

#include "mesa/kernels/elementwise.h"
#include "mesa/train/optimizer_setup.h"
#include "mesa/train/plan.h"
#include "mesa/train/setup.h"
#include "mesa/train/teacher.h"
#include "support/data_files.h"
#include "support/errors.h"
#include "support/gradcheck.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

const std::string kVit = "model: {name: vit, image_size: 16, patch_size: 8, width: 24, depth: 2, heads: 3, classes: 4}\nseed: 5\n";

RunConfig config_of(const std::vector<std::string>& sets, const std::string& text = kVit) { return parse_config(text, "l.yaml", sets); }

std::set<std::string> trained(const std::vector<std::string>& sets, const std::string& text = kVit) {
  const RunConfig config = config_of(sets, text);
  BuiltModel model(config, model_config(config, 4), kMeta);
  std::set<std::string> names;
  for (const Param& param : model.params.params())
    if (param.trainable) names.insert(param.name);
  return names;
}

std::string refusal(const std::vector<std::string>& sets, const std::string& text = kVit) {
  return error_of([&] { trained(sets, text); });
}

/// A model with factors that are no zeros.
struct Adapted {
  RunConfig config;
  BuiltModel model;
  explicit Adapted(const std::vector<std::string>& sets) : config(config_of(sets)), model(config, model_config(config, 4), test_device()) {
    for (Param& param : model.params.params()) {
      if (!is_lora_factor(param.name)) continue;
      transfer(normal_tensor(param.value.shape(), param.name), param.value);
      kernels::scale(param.value, 0.1, param.value);
      param.touch();
    }
  }
  void write(const std::string& path, bool with_config = true) const {
    std::vector<NamedTensor> weights;
    for (const Param& param : model.params.params()) weights.push_back({param.name, to(param.value, kCpu)});
    write_safetensors(
        path, weights,
        with_config ? std::map<std::string, std::string>{{"mesa.config", to_yaml(config)}} : std::map<std::string, std::string>{});
  }
};

Tensor pictures() {
  return to(normal_tensor({3, 3, 16, 16}, "pictures", DType::f32, MemoryKind::inputs), test_device(), MemoryKind::inputs);
}

Numbers logits(const BuiltModel& model) { return to(model.net(pictures()).value(), kCpu).to_vector<double>(); }

struct Memory {
  int64_t activations, gradients, optimizer;
};

Memory plan_of(const RunConfig& config) {
  const Plan plan = plan_run(config, model_config(config, 10));
  const auto peak = [&](MemoryKind kind) { return plan.peak.peak_kind[static_cast<int>(kind)]; };
  return {plan.activation_bytes, peak(MemoryKind::gradients), peak(MemoryKind::optimizer)};
}

}  // namespace

TEST_CASE("lora: the factors and the head learn, and what is named besides") {
  const std::set<std::string> head{"head.weight", "head.bias"};
  auto expected = head;
  for (const char* block : {"blocks.0", "blocks.1"})
    for (const char* factor : {"lora_A", "lora_B"}) expected.insert(concat(block, ".attn.qkv.", factor, ".weight"));
  CHECK(trained({"lora.rank=2"}) == expected);
  expected.insert("norm.weight"), expected.insert("norm.bias"), expected.insert("pos_embed");
  CHECK(trained({"lora.rank=2", "lora.train=[norm.*, pos_embed]"}) == expected);
  CHECK(trained({"lora.rank=2", "lora.train=[norm.*, pos_embed]", "train.frozen=[blocks.*, norm.bias]"}) ==
        std::set<std::string>{"head.weight", "head.bias", "norm.weight", "pos_embed"});
  CHECK(trained({"lora.rank=2", "lora.targets=[head]"}) == std::set<std::string>{"head.lora_A.weight", "head.lora_B.weight"});
  CHECK(trained({"lora.rank=2", "lora.targets=[head]"}, "model: {name: vit, distilled: true}\n") ==
        std::set<std::string>{"head.lora_A.weight", "head.lora_B.weight", "head_dist.weight", "head_dist.bias"});
  CHECK(trained({"lora.rank=2", "lora.targets=[fc]", "lora.train=[bn1.*]"}, "model: {name: resnet18}\n") ==
        std::set<std::string>{"fc.lora_A.weight", "fc.lora_B.weight", "bn1.weight", "bn1.bias"});
  CHECK(trained({"lora.rank=0"}).size() == trained({}).size());
}

TEST_CASE("lora: a target or name that nothing matches is refused with its place and near ones") {
  CHECK_THAT(refusal({"lora.rank=2", "lora.targets=[blocks.0.attn.qvk]"}),
             Contains("--set lora.targets=[blocks.0.attn.qvk]: lora.targets: no linear matches 'blocks.0.attn.qvk'; the nearest is "
                      "blocks.0.attn.qkv; this model's linears are blocks.*.attn.qkv, blocks.*.attn.proj, blocks.*.mlp.fc1, "
                      "blocks.*.mlp.fc2, head"));
  CHECK_THAT(refusal({"lora.rank=2", "lora.targets=[\"*.fc1\", \"*.fc1.weight\"]"}), Contains("no linear matches '*.fc1.weight'"));
  CHECK_THAT(refusal({"lora.rank=2"}, "model: {name: pvt_tiny}\n"),
             Contains("lora.targets: no linear matches '*.attn.qkv'") && Contains("block1.*.attn.kv"));
  CHECK_THAT(refusal({"lora.rank=2", "lora.train=[norn.*]"}), Contains("lora.train: no parameter matches 'norn.*'"));
  CHECK_THAT(refusal({"lora.rank=2", "lora.targets=[]"}), Contains("lora.targets: is empty"));
  CHECK_THAT(refusal({"lora.rank=-1"}), Contains("lora.rank: must be at least 0"));
  CHECK_THAT(refusal({"lora.alpha=0"}), Contains("lora.alpha: must be above 0"));
  CHECK_THAT(refusal({"lora.dropout=1"}), Contains("lora.dropout: must be at least 0 and below 1"));
  CHECK_THAT(refusal({"lora.r=8"}), Contains("unknown key 'lora.r'"));
  CHECK(refusal({"lora.rank=0", "lora.targets=[nothing]"}).empty());
}

TEST_CASE("lora: alpha is the rank unless it is given, and the log tells what is trained") {
  CHECK(lora_options(config_of({"lora.rank=8"})).factor() == 1);
  CHECK(lora_options(config_of({"lora.rank=8", "lora.alpha=16"})).factor() == 2);
  const RunConfig config = config_of({"lora.rank=2", "lora.alpha=3"});
  BuiltModel model(config, model_config(config, 4), kMeta);
  // Two factors of 2 (24 + 72) in each block, and a head of 4 classes.
  CHECK(describe_lora(config, model.params) ==
        concat("rank 2, alpha 3 on 2 linears; 484 of ", model.params.count(), " parameters are trained"));
  const Plan plan = plan_run(config, model_config(config, 4));
  CHECK(plan.trained == 484);
  CHECK_THAT(format_plan(plan, 64), Contains(concat("parameters        ", model.params.count(), ", of which 484 are trained")));
}

TEST_CASE("lora: at rank 8 on qkv less waits for the backward pass than in full fine-tuning") {
  const std::string text = "model: {name: vit, image_size: 64, patch_size: 8, width: 192, depth: 4, heads: 3, classes: 10}\n";
  const auto both = [&](const std::string& storage) {
    RunConfig full = config_of({"train.batch_size=4"}, text), lora = config_of({"train.batch_size=4", "lora.rank=8"}, text);
    if (storage != "plain") full.storage = lora.storage = load_storage(storage);
    return std::pair{plan_of(full), plan_of(lora)};
  };
  for (const char* storage : {"plain", "mesa", "int8", "int4", "int2"}) {
    CAPTURE(storage);
    const auto [full, lora] = both(storage);
    CHECK(lora.activations < full.activations);
    // Two factors of 8 (192 + 576) in each block, and the head; AdamW keeps two moments.
    const int64_t trained = 4 * (4 * 8 * (192 + 576) + 10 * 193);
    CHECK(lora.gradients >= trained);
    CHECK(lora.gradients <= trained + 64 * 10);  // begins of cache lines
    if (std::string(storage) == "mesa")
      CHECK(lora.optimizer >= 2 * trained);  // on a GPU running ranges count here, too
    else
      CHECK(lora.optimizer == 2 * trained);
    CHECK(full.gradients > 15 * lora.gradients);
  }
  // Without rebuilding, linears keep 7 of a block's 16 d elements: x of qkv, fc1 and, four times as wide, of fc2; proj shares attention's
  // o.
  CHECK(both("plain").second.activations < 0.72 * static_cast<double>(both("plain").first.activations));
  // The policy `exact` keeps no input of a linear for itself anyway: what is left is the input of each second factor.
  const auto [full, lora] = both("exact");
  CHECK(lora.activations <= full.activations + 4 * 4 * 65 * 8 * 4);
}

TEST_CASE("lora: with the first factors frozen what they read is not kept either") {
  const RunConfig config = config_of({"lora.rank=2", "lora.targets=[blocks.*]", "train.frozen=[\"*.lora_A.weight\"]"});
  int64_t second_factors = 0;
  for (const SiteRecord& record : plan_run(config, model_config(config, 4)).sites) {
    CHECK_THAT(record.site.name(), !Contains("lora_A:x"));
    second_factors += record.site.name().ends_with("lora_B:x");
  }
  CHECK(second_factors == 2 * 4);
}

TEST_CASE("lora: factors merged give the plain model's logits, and what is written says so") {
  INFO(seed_note());
  const TemporaryFolder folder;
  const std::string file = (folder.path() / "lora.safetensors").string(), plain_file = (folder.path() / "plain.safetensors").string();
  const std::vector<std::string> sets{"lora.rank=3", "lora.alpha=6", "lora.targets=[blocks.*, head]"};
  const Adapted adapted(sets);
  adapted.write(file);
  CHECK_THAT(write_merged(file, WeightsKind::automatic, plain_file), Contains("merged LoRA's factors into 9 linears of " + file));
  const LoadedModel loaded = load_model(plain_file);
  CHECK(loaded.config.lora == LoraConfig{});
  BuiltModel plain(loaded.config, model_config(loaded.config, 4), test_device());
  load_weights(plain.params, loaded.weights, plain_file);
  const Numbers expected = logits(adapted.model), merged = logits(plain);
  CHECK(largest_difference(merged, expected) <= 1e-5 * largest(expected));
  // Without the factors they would be others.
  BuiltModel base(config_of({}), model_config(config_of({}), 4), test_device());
  CHECK(largest_difference(logits(base), expected) > 1e-3 * largest(expected));
  CHECK_THAT(error_of([&] { write_merged(plain_file, WeightsKind::automatic, file); }), Contains("nothing to merge"));
}

TEST_CASE("lora: train.weights takes a run with LoRA merged, whether the new one has LoRA or not") {
  INFO(seed_note());
  const TemporaryFolder folder;
  const std::string file = (folder.path() / "lora.safetensors").string();
  const Adapted adapted({"lora.rank=3", "lora.alpha=6"});
  adapted.write(file);
  const Numbers expected = logits(adapted.model);
  for (const std::vector<std::string>& sets :
       {std::vector<std::string>{"seed=9"}, {"seed=9", "lora.rank=3"}, {"seed=9", "lora.rank=2", "lora.targets=[blocks.*.mlp.*]"}}) {
    const RunConfig config = config_of(sets);
    BuiltModel model(config, model_config(config, 4), test_device());
    CHECK_THAT(start_from_weights(model.params, file), Contains("merged its LoRA into 2 linears") && !Contains("lora_A"));
    CHECK(largest_difference(logits(model), expected) <= 1e-5 * largest(expected));
    for (const Param& param : model.params.params())
      if (is_lora_factor(param.name))
        CHECK((largest(to(param.value, kCpu).to_vector<double>()) > 0) == (param.name.find("lora_A") != std::string::npos));
  }
}

TEST_CASE("lora: a teacher with LoRA teaches what it learned") {
  INFO(seed_note());
  const TemporaryFolder folder;
  const std::string file = (folder.path() / "teacher.safetensors").string();
  const Adapted adapted({"lora.rank=3", "lora.alpha=6"});
  adapted.write(file);
  const RunConfig student = config_of({"distill.kind=hard", "distill.teacher=" + file});
  const Teacher teacher(student, model_config(student, 4).input(), test_device());
  const Numbers says = to(teacher(pictures()), kCpu).to_vector<double>(), expected = logits(adapted.model);
  CHECK(largest_difference(says, expected) <= 1e-5 * largest(expected));
  CHECK_NOTHROW(plan_run(student, model_config(student, 4)));
}

TEST_CASE("lora: factors that cannot be merged are refused") {
  const TemporaryFolder folder;
  const std::string file = (folder.path() / "lora.safetensors").string();
  const Adapted adapted({"lora.rank=3"});
  adapted.write(file, false);
  CHECK_THAT(error_of([&] { write_merged(file, WeightsKind::automatic, file + "2"); }), Contains("does not say their alpha"));
  adapted.write(file);
  const auto spoiled = [&](const std::function<void(SafetensorsFile&)>& spoil) {
    SafetensorsFile weights = read_safetensors(file);
    spoil(weights);
    return error_of([&] { merge_lora(weights, "f"); });
  };
  const auto drop = [](const char* name) {
    return [name](SafetensorsFile& w) { std::erase_if(w.tensors, [&](const NamedTensor& t) { return t.name == name; }); };
  };
  CHECK_THAT(spoiled(drop("blocks.1.attn.qkv.lora_B.weight")), Contains("f: blocks.1.attn.qkv is [72, 24] and lacks factors of rank 3"));
  CHECK_THAT(spoiled(drop("blocks.0.attn.qkv.weight")), Contains("f has LoRA's factors of blocks.0.attn.qkv but not its weight"));
  CHECK_THAT(spoiled([](SafetensorsFile& w) { w.metadata["mesa.config"] = to_yaml(config_of({"lora.rank=2"})); }),
             Contains("lacks factors of rank 2"));
  CHECK_THAT(spoiled([](SafetensorsFile& w) { w.metadata["mesa.config"] = to_yaml(config_of({})); }), Contains("knows nothing"));
  CHECK(spoiled([](SafetensorsFile&) {}).empty());
}

TEST_CASE("lora: a head of other classes that LoRA would freeze with random values is refused") {
  const TemporaryFolder folder;
  const std::string file = (folder.path() / "plain.safetensors").string();
  Adapted({}).write(file);
  const auto start = [&](const std::vector<std::string>& sets) {
    const RunConfig config = config_of(sets);
    BuiltModel model(config, model_config(config, 4));
    return error_of([&] { start_from_weights(model.params, file); });
  };
  CHECK_THAT(start({"lora.rank=2", "lora.targets=[head]", "model.classes=7"}),
             Contains("head.weight") && Contains("leave it out of lora.targets"));
  CHECK(start({"lora.rank=2", "lora.targets=[head]"}).empty());
  CHECK(start({"lora.rank=2", "model.classes=7"}).empty());
  CHECK(start({"lora.rank=2", "lora.targets=[head]", "lora.train=[head.weight, head.bias]", "model.classes=7"}).empty());
}

TEST_CASE("lora: averages, layer decay and weight decay reach the factors, and only what learns has moments") {
  const RunConfig config =
      config_of({"lora.rank=2", "optimizer.layer_decay=0.5", "train.ema_decay=0.9", "optimizer.no_decay=[\"*.lora_B.weight\"]"});
  BuiltModel model(config, model_config(config, 4));
  model.params.allocate_gradients();
  const auto optimizer = make_optimizer(config, model.params);
  const Param &a = model.params.at("blocks.0.attn.qkv.lora_A.weight"), &b = model.params.at("blocks.1.attn.qkv.lora_B.weight");
  CHECK(a.lr_scale == 0.25);
  CHECK(b.lr_scale == 0.5);
  CHECK((a.decay && !b.decay));
  CHECK(optimizer->state().size() == 2 * 6);
  const auto ema = make_ema(config, model.params);
  for (Param& param : model.params.params())
    if (param.trainable) kernels::fill(param.grad, 1), param.grad_written = true;
  const std::vector<float> frozen = model.params.at("blocks.0.attn.qkv.weight").value.to_vector<float>();
  optimizer->step(0.1), ema->update(), optimizer->step(0.1), ema->update();
  CHECK(model.params.at("blocks.0.attn.qkv.weight").value.to_vector<float>() == frozen);
  const auto average = ema->state();
  CHECK(average.at(b.name).to_vector<float>() != b.value.to_vector<float>());
  CHECK(average.at("blocks.0.attn.qkv.weight").to_vector<float>() == frozen);
}
