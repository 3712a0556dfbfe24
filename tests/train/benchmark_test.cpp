#include "mesa/train/benchmark.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>
#include <set>

#include "mesa/train/kernel_benchmark.h"
#include "mesa/train/plan.h"
#include "mesa/train/version.h"
#include "support/device.h"

using namespace mesa;
using Catch::Matchers::Contains;

namespace {

const char* const kTiny =
    "model: {name: vit, image_size: 16, patch_size: 4, width: 64, depth: 2, heads: 2, channels: 3, classes: 5}\n"
    "data: {kind: random}\n"
    "train: {batch_size: 4}\n"
    "optimizer: {lr: 1e-3}\n";

RunConfig tiny(const std::vector<std::string>& overrides = {}) { return parse_config(kTiny, "tiny.yaml", overrides); }

StorageConfig storage(const std::string& codec) { return {codec, {{"*", codec, {}, "here"}, {"patch_embed.proj:x", "exact", {}, "here"}}}; }

BenchmarkOptions one_step(std::vector<StorageConfig> policies) {
  BenchmarkOptions options;
  options.policies = std::move(policies);
  options.steps = 1;
  options.warmup = 1;
  return options;
}

void check_ordered(const Spread& s) {
  CHECK(s.minimum <= s.median);
  CHECK(s.median <= s.maximum);
}

}  // namespace

TEST_CASE("benchmark: the spread of values") {
  CHECK(spread_of({3, 1, 2}).median == 2);
  CHECK(spread_of({4, 1, 2, 3}).median == 2.5);
  CHECK(spread_of({4, 1, 2, 3}).minimum == 1);
  CHECK(spread_of({4, 1, 2, 3}).maximum == 4);
  CHECK_THROWS_AS(spread_of({}), Error);
}

TEST_CASE("benchmark: fewer bits keep fewer bytes and err more") {
  const BenchmarkResult result = run_benchmark(tiny(), one_step({storage("exact"), storage("int8"), storage("int4"), storage("int2")}));
  REQUIRE(result.policies.size() == 4);
  // Rounding alone: the shipped exact policy, which is the reference, rebuilds what this one keeps.
  CHECK(result.policies[0].gradient_relative_error.maximum < 1e-6);
  CHECK(result.policies[1].gradient_relative_error.minimum > 0);
  CHECK(result.policies[1].gradient_relative_error.maximum < 0.1);
  for (size_t i = 1; i < 4; ++i) {
    const PolicyResult &better = result.policies[i - 1], &p = result.policies[i];
    CAPTURE(p.storage);
    CHECK(p.gradient_relative_error.minimum > better.gradient_relative_error.maximum);
    CHECK(p.activation_bytes_per_image.median < better.activation_bytes_per_image.median);
    CHECK(p.peak_bytes.median < better.peak_bytes.median);
    check_ordered(p.gradient_relative_error);
  }
}

TEST_CASE("benchmark: bytes by kind and by site are those of the policy alone") {
  const BenchmarkResult alone = run_benchmark(tiny(), one_step({storage("int4")}));
  const BenchmarkResult among = run_benchmark(tiny(), one_step({storage("exact"), storage("int4"), storage("int8")}));
  const PolicyResult &a = alone.policies[0], &b = among.policies[1];
  if (testing::test_device() == kCpu) {  // on a GPU the optimizer's table of a model that is gone may leave its cache in the meantime
    CHECK(a.bytes_by_kind == b.bytes_by_kind);
    CHECK(a.peak_bytes.maximum == b.peak_bytes.maximum);
  }
  CHECK(a.activation_bytes_per_image.median == b.activation_bytes_per_image.median);
  CHECK(alone.exact_activation_bytes_per_image == among.exact_activation_bytes_per_image);

  int64_t total = 0, kept = 0;
  for (int64_t bytes : a.bytes_by_kind) total += bytes;
  for (const SiteRecord& site : a.sites) kept += site.kept_bytes;
  CHECK(a.peak_bytes.median == static_cast<double>(total));
  CHECK(a.activation_bytes_per_image.median * 4 == static_cast<double>(kept));
  CHECK(a.bytes_by_kind[static_cast<int>(MemoryKind::parameters)] == alone.parameters * 4);
  CHECK(a.bytes_by_kind[static_cast<int>(MemoryKind::optimizer)] == alone.parameters * 8);
}

TEST_CASE("benchmark: an exact policy beside dropout and clipping has the reference's gradients") {
  const RunConfig config = tiny({"model.drop_rate=0.1", "model.drop_path=0.1", "train.clip_norm=0.5", "train.label_smoothing=0.1"});
  BenchmarkOptions options = one_step({load_storage("exact"), storage("exact")});
  int64_t told = 0;
  options.progress = [&](const std::string&) { ++told; };
  const BenchmarkResult result = run_benchmark(config, options);
  CHECK(result.policies[0].gradient_relative_error.maximum == 0);
  CHECK(result.policies[1].gradient_relative_error.maximum < 1e-6);
  CHECK(result.policies[0].activation_bytes_per_image.median == result.exact_activation_bytes_per_image);
  CHECK(told >= 5);
}

TEST_CASE("benchmark: phases are parts of a step, on a GPU of steps of their own that wait in between") {
  BenchmarkOptions options = one_step({storage("exact"), storage("int8")});
  options.steps = 7;
  int64_t apart = 0;
  options.progress = [&](const std::string& what) { apart += what.starts_with("phases "); };
  const BenchmarkResult result = run_benchmark(tiny(), options);
  const bool gpu = testing::test_device() == kCuda;
  CHECK(apart == (gpu ? 5 : 0));
  for (const PolicyResult& p : result.policies) {
    const double least = p.forward_ms.minimum + p.backward_ms.minimum + p.optimizer_ms.minimum;
    CHECK(least > 0);
    if (!gpu) CHECK(least <= p.step_ms.minimum * (1 + 1e-9));  // a sum of doubles
    CHECK(p.images_per_second.maximum == Approx(4e3 / p.step_ms.minimum));
  }
}

TEST_CASE("benchmark: the loss is the config's") {
  const auto kept = [](const std::vector<std::string>& sets) {
    std::set<std::string> slots;
    const BenchmarkResult result = run_benchmark(tiny(sets), one_step({storage("exact")}));
    for (const SiteRecord& site : result.policies[0].sites) slots.insert(site.site.name());
    return slots;
  };
  const std::set<std::string> one_right = kept({}), yes_or_no = kept({"train.loss=bce"}), mixed = kept({"data.mixup=0.8"});
  CHECK((one_right.count("cross_entropy:logits") == 1 && one_right.count("cross_entropy:targets") == 0));
  CHECK((yes_or_no.count("cross_entropy:logits") == 0 && yes_or_no.count("binary_cross_entropy:logits") == 1));
  CHECK(mixed.count("cross_entropy:targets") == 1);  // labels that may be mixed are dense
  CHECK_THROWS_WITH(kept({"train.bce_threshold=0.2"}), Contains("train.bce_threshold"));
  // What the plan counts of the same config.
  const RunConfig config = tiny({"train.loss=bce", "data.mixup=0.8"});
  const BenchmarkResult result = run_benchmark(config, one_step({config.storage}));
  const Plan plan = plan_run(config, model_config(config, known_classes(config)));
  CHECK(result.policies[0].activation_bytes_per_image.median * 4 == static_cast<double>(plan.activation_bytes));
}

TEST_CASE("benchmark: the JSON and the table") {
  const BenchmarkResult result = run_benchmark(tiny({"train.threads=1"}), one_step({storage("exact"), storage("int8")}));
  const auto json = nlohmann::json::parse(benchmark_json(result));
  CHECK(json.at("model") == "vit");
  CHECK(json.at("batch_size") == 4);
  CHECK(json.at("precision") == "fp32");
  CHECK(json.at("device") == to_string(testing::test_device().kind));
  CHECK(json.at("threads") == 1);
  REQUIRE(json.at("policies").size() == 2);
  const auto& policy = json.at("policies").at(1);
  CHECK(policy.at("storage") == "int8");
  for (const char* key : {"images_per_second", "relative_speed", "step_ms", "forward_ms", "backward_ms", "optimizer_ms",
                          "activation_bytes_per_image", "peak_bytes", "gradient_relative_error"})
    for (const char* part : {"minimum", "median", "maximum"}) {
      CAPTURE(key, part);
      CHECK(policy.at(key).at(part).get<double>() > 0);
    }
  CHECK(policy.at("bytes_by_kind").size() == kMemoryKinds);
  const auto& sites = policy.at("sites");
  REQUIRE(!sites.empty());
  bool found = false;
  for (const auto& site : sites) {
    CHECK(site.at("exact_bytes").is_number_integer());
    CHECK(site.at("kept_bytes").is_number_integer());
    if (site.at("name") != "blocks.0.norm2:xhat") continue;
    found = true;
    CHECK(site.at("codec") == "int8");
    CHECK(site.at("shape") == nlohmann::json({4, 17, 64}));
  }
  CHECK(found);

  const std::string text = format_benchmark(result);
  CHECK_THAT(text, Contains("vit: ") && Contains(concat("batch 4, fp32, ", to_string(testing::test_device().kind), " (1 thread, ")) &&
                       Contains(result.matmul));
  CHECK_THAT(text, Contains("\nexact ") && Contains("\nint8 ") && Contains("gradient error"));
}

TEST_CASE("benchmark: what cannot be measured is refused") {
  BenchmarkOptions options = one_step({storage("exact")});
  options.steps = 0;
  CHECK_THROWS_AS(run_benchmark(tiny(), options), UsageError);
  options = one_step({storage("exact")});
  options.warmup = -1;
  CHECK_THROWS_AS(run_benchmark(tiny(), options), UsageError);
  const StorageConfig astray{"astray", {{"*", "exact", {}, "here"}, {"blocks.7.*", "int8", {}, "astray.yaml:3"}}};
  CHECK_THROWS_WITH(run_benchmark(tiny(), one_step({astray})), Contains("astray.yaml:3") && Contains("blocks.7.*"));
  const RunConfig diverging = tiny({"optimizer.lr=1", "optimizer.weight_decay=1e12"});
  CHECK_THROWS_WITH(run_benchmark(diverging, one_step({storage("exact")})), Contains("the loss of step"));
}

TEST_CASE("benchmark: a profile has every kernel of a GPU's step, the longest first") {
  BenchmarkOptions options = one_step({storage("exact"), storage("int4")});
  options.profile = true;
  if (testing::test_device() != kCuda) {
    CHECK_THROWS_WITH(run_benchmark(tiny(), options), Contains("only a GPU's kernels") && Contains("--device cuda"));
    return;
  }
  const BenchmarkResult result = run_benchmark(tiny({"train.precision=bf16", "device=cuda"}), options);
  const auto calls = [](const PolicyResult& policy, const std::string& kernel) {
    int64_t count = 0;
    for (const cuda::ProfileRow& row : policy.profile) count += row.name.starts_with(kernel) ? row.calls : 0;
    return count;
  };
  for (const PolicyResult& policy : result.policies) {
    CAPTURE(policy.storage);
    CHECK(std::is_sorted(policy.profile.begin(), policy.profile.end(), [](const auto& a, const auto& b) { return a.ms > b.ms; }));
    REQUIRE(!policy.profile.empty());
    CHECK(policy.profile.front().ms > 0);
    CHECK(calls(policy, "fused_attention_grad (dq)") == 2);    // one a block
    CHECK(calls(policy, "product: ") == 3 * (2 * 4 + 1) + 2);  // y, dx, dw of four linears a block and of the head, y and dw of patches
    CHECK((calls(policy, "quantize_current") > 0) == (policy.storage == "int4"));
    CHECK_THAT(format_benchmark(result), Contains("kernels of a step, " + policy.storage) && Contains("fused_attention_grad (dq)"));
  }
  CHECK(nlohmann::json::parse(benchmark_json(result)).at("policies")[1].at("profile").size() == result.policies[1].profile.size());
  CHECK(!cuda::profiling());
}

TEST_CASE("benchmark: every kernel of a step is timed, in bytes or in products") {
  std::vector<std::string> told;
  const KernelReport report = run_kernel_benchmark(
      tiny(), [&](const std::string& name) { told.push_back(name); }, 1 << 16);
  CHECK(report.copy_bytes_per_second > 0);
  REQUIRE(told.size() == report.kernels.size());
  for (size_t i = 0; i < told.size(); ++i) {
    const KernelResult& kernel = report.kernels[i];
    INFO(kernel.name);
    CHECK(kernel.name == told[i]);
    CHECK((kernel.bytes > 0) != (kernel.flops > 0));
    CHECK((kernel.of_copy > 0) == (kernel.bytes > 0));
    CHECK((kernel.of_bandwidth > 0) == (kernel.bytes > 0));
    check_ordered(kernel.ms);
    CHECK(kernel.ms.minimum > 0);
    CHECK_THAT(format_kernels(report), Contains(kernel.name));
  }
  // Each beside a copy of as many bytes, which is not the longest.
  CHECK(
      std::any_of(report.kernels.begin(), report.kernels.end(), [](const auto& kernel) { return kernel.of_copy != kernel.of_bandwidth; }));
  for (const char* name : {"layer_norm",
                           "gelu_grad",
                           "quantize, runs of 256, 4 bits",
                           "dequantize, 2 bits",
                           "attention_grad",
                           "fc1: dw, db",
                           "fc1: dw",
                           "adamw",
                           "sgd",
                           "lamb",
                           "moving_average",
                           "softmax_grad",
                           "cross_entropy_grad",
                           "mixed_targets",
                           "binary_cross_entropy_grad",
                           "normalize_images, mixed",
                           "batch_norm_grad",
                           "apply_mask",
                           "max_pool_grad",
                           "gather_windows",
                           "attention_grad in windows"})
    CHECK(std::find(told.begin(), told.end(), name) != told.end());
  const bool gpu = testing::test_device() == kCuda;
  for (const char* name : {"layer_norm, codes 4 bits", "gelu, codes 2 bits", "affine, coded 4 bits", "gelu_grad, coded 8 bits",
                           "gelu_grad and gelu, with sums", "gelu_grad and gelu, with sums, coded in runs, 4 bits"})
    CHECK((std::find(told.begin(), told.end(), name) != told.end()) == gpu);
  std::sort(told.begin(), told.end());
  CHECK(std::adjacent_find(told.begin(), told.end()) == told.end());  // each once
  const auto json = nlohmann::json::parse(kernels_json(report));
  CHECK(json.at("kernels").size() == told.size());
}

TEST_CASE("version: names the build and its backends") {
  CHECK_THAT(version_text(), Contains("mesa ") && Contains("commit ") && Contains("\ncuda      "));
}
