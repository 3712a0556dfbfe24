// The plan against the meter: what a dry run promises is what a step then keeps.
#include "mesa/train/plan.h"

#include <catch2/catch.hpp>
#include <filesystem>

#include "mesa/kernels/attention.h"
#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/matmul.h"
#include "mesa/train/checkpoint.h"
#include "mesa/train/objective.h"
#include "mesa/train/optimizer_setup.h"
#include "mesa/train/safetensors.h"
#include "mesa/train/trainer.h"
#include "support/data_files.h"
#include "support/device.h"
#include "support/tiny_config.h"

using namespace mesa;
using namespace mesa::testing;

namespace {

/// One step of six images keeps what the plan says, in all and at every site.
void check_plan(const RunConfig& config) {
  const NetConfig net = model_config(config, 10);
  const Plan plan = plan_run(config, net);

  BuiltModel model(config, net, test_device());
  StoragePolicy policy = make_policy(config.storage);
  const Tensor pixels = Tensor::empty({6, 3, net.input().image_size, net.input().image_size}, DType::f32);
  for (int64_t i = 0; i < pixels.numel(); ++i) pixels.data<float>()[i] = static_cast<float>(i % 17) / 17;
  const Tensor images = Tensor::empty(pixels.shape(), model.images, test_device(), MemoryKind::inputs);
  kernels::copy(to(pixels, test_device()), images);
  const Tensor labels = to(Tensor::from<int64_t>({6}, {0, 1, 2, 3, 4, 5}, MemoryKind::inputs), test_device(), MemoryKind::inputs);
  const auto kept_now = [] { return Allocator::of(test_device()).use().of(MemoryKind::activations); };
  const int64_t before = kept_now();
  const Objective objective(config, net.input(), test_device());
  const Targets targets = objective.targets({images, labels, {}});
  Tape tape(policy, 1, 2);
  const Var loss = objective(model.net, images, targets);
  CHECK(kept_now() - before == plan.activation_bytes);
  CHECK(model.params.count() == plan.parameters);
  const auto sites = policy.sites();
  REQUIRE(sites.size() == plan.sites.size());
  int64_t sum = 0;
  for (size_t i = 0; i < sites.size(); ++i) {
    CAPTURE(sites[i].site.name());
    CHECK(sites[i].site.name() == plan.sites[i].site.name());
    CHECK(sites[i].kept_bytes == plan.sites[i].kept_bytes);
    CHECK(sites[i].exact_bytes == plan.sites[i].exact_bytes);
    sum += sites[i].kept_bytes;
  }
  CHECK(sum == plan.activation_bytes);
}

}  // namespace

TEST_CASE("plan: kept bytes equal the meter's exactly, in every storage, precision and attention") {
  const std::string storage = GENERATE("exact", "bf16", "int8", "int4", "int2", "rebuild");
  const std::string precision = GENERATE("fp32", "bf16"), attention = GENERATE("fused", "explicit"), pool = GENERATE("token", "mean");
  if (precision == "bf16" && !kernels::native_bf16()) return;
  CAPTURE(storage, precision, attention, pool);
  const std::string rules = storage == "rebuild" ? "[{match: \"*\", codec: exact}, {match: \"*.fc?:x\", codec: rebuild}]"
                                                 : "[{match: \"*\", codec: " + storage + "}]";
  const RunConfig config = parse_config(
      "model: {name: vit, image_size: 16, patch_size: 4, width: 48, depth: 2, heads: 3, classes: 10, "
      "drop_path: 0.3, drop_rate: 0.1, attention: " +
          attention + ", pool: " + pool +
          "}\n"
          "train: {batch_size: 6, precision: " +
          precision + "}\nstorage: " + rules + "\n",
      "plan.yaml");
  check_plan(config);
}

TEST_CASE("plan: attention by cuDNN counts what its backward takes beside its operands") {
  const auto room = [](DType type) { return Tensor::empty({4, 197, 384}, type, kMetaCuda); };
  const Tensor q = room(DType::bf16), k = room(DType::bf16), v = room(DType::bf16), o = room(DType::bf16), d_o = room(DType::bf16),
               dq = room(DType::bf16), dk = room(DType::bf16), dv = room(DType::bf16);
  const Tensor lse = Tensor::empty({4, 6, 197}, DType::f32, kMetaCuda);
  Allocator& memory = Allocator::of(kMetaCuda);
  const auto taken = [&](bool decoded) {  // q, k and v: then with an o and a log-sum-exp of their own
    memory.reset_peak();
    const int64_t before = memory.use().total;
    kernels::attention_grad(d_o, {q, {}}, {k, {}}, {v, {}}, decoded ? Tensor() : o, decoded ? Tensor() : lse, 6, 0.125, dq, dk, dv,
                            kernels::AttentionBy::cudnn);
    return memory.use().peak - before;
  };
  CHECK(taken(false) == 2 * 4 * 6 * 256 * 256);
  CHECK(taken(true) == 2 * 4 * 6 * 256 * 256 + 2 * 4 * 197 * 384 + 4 * 4 * 6 * 197);
}

TEST_CASE("plan: the same with mixed labels, independent classes and a teacher") {
  const TemporaryFolder folder;
  const std::string model =
      "model: {name: vit, image_size: 16, patch_size: 4, width: 48, depth: 2, heads: 3, classes: 10, distilled: true}\n";
  ParamStore teacher;
  const RunConfig taught = parse_config(model, "teacher.yaml");
  const Net net(Builder(teacher, 3), model_config(taught, 10));
  std::vector<NamedTensor> weights;
  for (const Param& p : teacher.params()) weights.push_back({p.name, p.value});
  const std::string path = (folder.path() / "teacher.safetensors").string();
  write_safetensors(path, weights, {{"mesa.config", to_yaml(taught)}});
  const std::string sets = GENERATE("data.mixup=1", "train.loss=bce", "distill.kind=soft", "distill.kind=hard");
  CAPTURE(sets);
  std::vector<std::string> all{sets, "train.batch_size=6"};
  if (sets.starts_with("distill")) all.push_back("distill.teacher=" + path);
  check_plan(parse_config(model + "storage: [{match: \"*\", codec: int8}]\n", "plan.yaml", all));
}

TEST_CASE("plan: the same of every family in every shipped storage") {
  const std::string storage = GENERATE("exact", "int8", "int4", "int2", "mesa", "mesa_swin");
  const std::string precision = GENERATE("fp32", "bf16");
  if (precision == "bf16" && !kernels::native_bf16()) return;
  const std::string model = GENERATE(
      "{name: swin, image_size: 24, patch_size: 2, width: 32, heads: 2, depths: [2, 1], window: 5, pad: true, drop_path: 0.2}",
      "{name: swin, image_size: 16, patch_size: 2, width: 32, heads: 1, depths: [2], window: 4, attention: explicit, attn_drop_rate: 0.1}",
      "{name: pvt_tiny, image_size: 32, depths: [1, 1, 1, 1], drop_path: 0.2}",
      "{name: resnet50, image_size: 40, width: 16, depths: [1, 2], drop_path: 0.2}",
      "{name: resnet18, image_size: 33, width: 8, depths: [1, 1]}", "{name: deit_tiny_distilled_patch16_224, depth: 2}");
  CAPTURE(storage, precision, model);
  RunConfig config = parse_config("model: " + model + "\ntrain: {batch_size: 6, precision: " + precision + "}\n", "plan.yaml");
  config.storage = load_storage(storage);
  check_plan(config);
}

TEST_CASE("plan: the same with LoRA on every family, in every shipped storage") {
  const std::string storage = GENERATE("exact", "int8", "int4", "int2", "mesa", "mesa_swin");
  const std::string precision = GENERATE("fp32", "bf16");
  if (precision == "bf16" && !kernels::native_bf16()) return;
  if (test_device() == kCuda && storage != "int8" && storage != "mesa") return;  // slow on the emulated one
  const auto [model, targets] = GENERATE(table<std::string, std::string>(
      {{"{name: swin, image_size: 24, patch_size: 2, width: 32, heads: 2, depths: [2, 1], window: 5, pad: true, drop_path: 0.2}",
        "[\"*\"]"},
       {"{name: pvt_tiny, image_size: 32, depths: [1, 1, 1, 1], drop_path: 0.2}", "[\"block?.*\", head]"},
       {"{name: resnet18, image_size: 33, width: 8, depths: [1, 1]}", "[fc]"},
       {"{name: deit_tiny_distilled_patch16_224, depth: 2}", "[\"*.qkv\", \"*.fc?\"]"},
       {"{name: deit3_small_patch16_224, depth: 2, drop_rate: 0.1}", "[\"*\"]"}}));
  CAPTURE(storage, precision, model, targets);
  RunConfig config = parse_config("model: " + model + "\ntrain: {batch_size: 6, precision: " + precision +
                                      "}\nlora: {rank: 5, dropout: 0.1, targets: " + targets + ", train: [\"*.bias\"]}\n",
                                  "plan.yaml");
  config.storage = load_storage(storage);
  check_plan(config);
}

TEST_CASE("plan: the optimizer's memory is what the meter finds, of every optimizer, with an average and what is frozen") {
  const std::string optimizer = GENERATE("name: adamw", "name: sgd", "name: sgd, momentum: 0", "name: lamb");
  const std::string train =
      GENERATE("ema_decay: 0", "ema_decay: 0.9", "ema_decay: 0.9, frozen: [blocks.0.*]", "ema_decay: 0.9}\nlora: {rank: 4");
  CAPTURE(optimizer, train);
  const RunConfig config = parse_config(
      "model: {name: vit, image_size: 16, patch_size: 4, width: 48, depth: 2, heads: 3, classes: 10}\n"
      "train: {batch_size: 6, " +
          train + "}\noptimizer: {" + optimizer + "}\n",
      "plan.yaml");
  const NetConfig net = model_config(config, 10);
  const Plan plan = plan_run(config, net);
  const auto held = [] { return Allocator::of(test_device()).use().of(MemoryKind::optimizer); };
  BuiltModel model(config, net, test_device());
  const int64_t before = held();
  const auto made = make_optimizer(config, model.params);
  const auto ema = make_ema(config, model.params);
  CHECK(held() - before == plan.peak.peak_kind[static_cast<int>(MemoryKind::optimizer)]);
  int64_t trained = 0;
  for (const Param& p : model.params.params()) trained += p.trainable ? p.value.bytes() : 0;
  const int64_t copies = (optimizer.find("momentum: 0") != std::string::npos ? 0 : optimizer == "name: sgd" ? 1 : 2) + (ema ? 1 : 0);
  CHECK(held() - before == trained * copies);
}

TEST_CASE("plan: of one of several ranks it knows the shared optimizer's part and the gradients' copies in bf16") {
  const std::string shard = GENERATE("none", "optimizer"), reduced = GENERATE("fp32", "bf16");
  const int64_t ranks = GENERATE(2, 5);
  CAPTURE(shard, reduced, ranks);
  RunConfig config = parse_config(
      "model: {name: vit, image_size: 16, patch_size: 4, width: 48, depth: 2, heads: 3, classes: 10}\n"
      "train: {batch_size: 6, frozen: [blocks.0.norm1.*], shard: " +
          shard + ", reduce_precision: " + reduced + "}\n",
      "plan.yaml");
  config.ranks = ranks, config.rank = 1;
  const NetConfig net = model_config(config, 10);
  const Plan plan = plan_run(config, net);
  const auto held = [](MemoryKind kind) { return Allocator::of(test_device()).use().of(kind); };
  const int64_t gradients = held(MemoryKind::gradients), state = held(MemoryKind::optimizer), parameters = held(MemoryKind::parameters);
  BuiltModel model(config, net, test_device());
  const auto communicator = single_communicator({1, ranks, 0, ""});
  const auto sync = share_gradients(config, model.params, *communicator);
  const auto optimizer = make_optimizer(config, model.params, shard_of(sync.get(), *communicator));
  const auto planned = [&](MemoryKind kind) { return plan.peak.peak_kind[static_cast<int>(kind)]; };
  CHECK(held(MemoryKind::optimizer) - state == planned(MemoryKind::optimizer));
  CHECK(held(MemoryKind::gradients) - gradients == planned(MemoryKind::gradients));
  CHECK(held(MemoryKind::parameters) - parameters == planned(MemoryKind::parameters));
  int64_t trained = 0;
  for (const Param& p : model.params.params()) trained += p.trainable ? p.value.bytes() : 0;
  const int64_t whole = 2 * trained, part = held(MemoryKind::optimizer) - state;
  CHECK(part >= (shard == "none" ? whole : whole / ranks));
  CHECK(part <= (shard == "none" ? whole : whole / ranks + whole / 10));  // rounded up for the parts' sake
}

TEST_CASE("plan: recorded passes keep a batch of their own, evaluations included") {
  const auto plan = [](const char* graph) {
    const RunConfig config =
        parse_config(concat("model: {name: vit, image_size: 32, patch_size: 8, width: 48, depth: 2, heads: 3, classes: 10}\n"
                            "device: cuda\ntrain: {batch_size: 64, precision: bf16, cuda_graph: ",
                            graph, "}\n"),
                     "plan.yaml");
    return plan_run(config, model_config(config, 10));
  };
  const Plan plain = plan("false"), recorded = plan("true");
  CHECK(plain.recorded == 0);
  CHECK(recorded.recorded > recorded.activation_bytes);
  // A step without records holds two batches and the pictures of one; an evaluation with records the copy that they read in one's place.
  CHECK(recorded.lasting >= plain.lasting);
  CHECK(recorded.reserved == recorded.lasting + recorded.passing + recorded.recorded);
}

#ifndef __SANITIZE_ADDRESS__  // which is to see every block, so that none shares a segment

TEST_CASE("plan: the passes of a run cover no more of a GPU's memory than its plan says") {
  if (test_device() != kCuda) return;
  const TemporaryFolder folder;
  Allocator& memory = Allocator::of(kCuda);
  // No plan has a product's workspace: the stand-in for cuBLASLt wants none for products this small, the library may, so that there the
  // model is one beside which it is small.
  const bool emulated = kernels::product_library().find("emulated") != std::string::npos;
  const int64_t workspace = emulated ? 0 : 32 << 20;
  // Running ranges are measured apart by the first pass.
  for (const char* storage :
       {"storage=[{match: \"*\", codec: int8, groups: heads, range: running}]", "storage=exact", "storage=int8", "storage=int4"})
    for (const char* other : {"train.eval_batch_size=8", "train.eval_batch_size=32", "train.accumulation=2", "data.mixup=0.8"}) {
      CAPTURE(storage, other);
      std::vector<std::string> sets{storage, other, "train.epochs=2", "train.precision=bf16", "train.batch_size=16"};
      if (!emulated)
        sets.insert(sets.end(), {"model.image_size=128", "model.width=384", "model.heads=6", "model.depth=12", "train.batch_size=48"});
      RunConfig config = parse_config(kTinyTraining, "tiny.yaml", sets);
      config.output = (folder.path() / "run").string();
      memory.release_cached();
      REQUIRE(memory.use().covered == 0);
      const Plan plan = plan_run(config, model_config(config, known_classes(config)));
      REQUIRE((emulated || plan.passing > 4 * workspace));
      REQUIRE(train(config, {"", true}) == 0);
      std::filesystem::remove_all(config.output);
      CHECK(memory.use().covered <= plan.passing + workspace + 1024);  // sums of gradients that add up lie between the blocks
      CHECK(memory.use().covered > plan.passing / 2);                  // which is not much too much either
    }
}

#endif
