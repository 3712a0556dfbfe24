// The plan against the meter: what a dry run promises is what a step then keeps.
#include "mesa/train/plan.h"

#include <catch2/catch.hpp>

#include "mesa/kernels/matmul.h"
#include "support/device.h"

using namespace mesa;
using namespace mesa::testing;

TEST_CASE("plan: kept bytes equal the meter's exactly, in every storage, precision and attention") {
  const std::string storage = GENERATE("exact", "bf16", "int8", "int4", "int2", "rebuild");
  const std::string precision = GENERATE("fp32", "bf16"), attention = GENERATE("fused", "explicit"), pool = GENERATE("token", "mean");
  if (precision == "bf16" && !kernels::native_bf16()) return;
  CAPTURE(storage, precision, attention, pool);
  const std::string rules = storage == "rebuild" ? "[{match: \"*\", codec: exact}, {match: \"*.fc?:x\", codec: rebuild}]"
                                                 : "[{match: \"*\", codec: " + storage + "}]";
  const RunConfig config = parse_config("model: {name: vit, image_size: 16, patch_size: 4, width: 48, depth: 2, heads: 3, classes: 10, "
                                        "drop_path: 0.3, drop_rate: 0.1, attention: " + attention + ", pool: " + pool + "}\n"
                                        "train: {batch_size: 6, precision: " + precision + "}\nstorage: " + rules + "\n", "plan.yaml");
  const NetConfig vit = model_config(config, 10);
  const Plan plan = plan_run(config, vit);

  BuiltModel model(config, vit, test_device());
  StoragePolicy policy = make_policy(config.storage);
  const Tensor images = Tensor::empty({6, 3, 16, 16}, DType::f32, kCpu, MemoryKind::inputs);
  for (int64_t i = 0; i < images.numel(); ++i) images.data<float>()[i] = static_cast<float>(i % 17) / 17;
  const Tensor labels = to(Tensor::from<int64_t>({6}, {0, 1, 2, 3, 4, 5}, MemoryKind::inputs), test_device(), MemoryKind::inputs);
  const auto kept_now = [] { return Allocator::of(test_device()).use().of(MemoryKind::activations); };
  const int64_t before = kept_now();
  Tape tape(policy, 1, 2);
  const Var loss = cross_entropy(model.net(to(images, test_device(), MemoryKind::inputs)), labels);
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
