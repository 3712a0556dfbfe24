// What the engine promises of a GPU and only an emulated one can count: when the host waits, and what happens when memory runs out.
#include <catch2/catch.hpp>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>
#include <utility>

#include "device_memory.h"
#include "emulator.h"
#include "mesa/base/cuda.h"
#include "mesa/base/files.h"
#include "mesa/base/scope.h"
#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/matmul.h"
#include "mesa/train/evaluate.h"
#include "mesa/train/plan.h"
#include "mesa/train/setup.h"
#include "mesa/train/trainer.h"
#include "streams.h"
#include "support/data_files.h"
#include "support/errors.h"
#include "support/process.h"
#include "support/random.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

const char* const kViT = "{name: vit, image_size: 32, patch_size: 8, width: 64, depth: 2, heads: 2, classes: 10}";

RunConfig config_of(const std::vector<std::string>& sets, const std::string& model = kViT) {
  return parse_config(concat("model: ", model, R"(
data: {kind: random, train_size: 512, test_size: 64, workers: 1}
train: {epochs: 1, batch_size: 64, threads: 1, steps: 2}
device: cuda
storage: [{match: "*", codec: int8, groups: heads, range: running}]
)"),
                      "engine.yaml", sets);
}

/// int4, by way of `pack` alone: every value is coded when it is there.
struct CodesAfterwards : Codec {
  std::unique_ptr<Codec> inner;
  explicit CodesAfterwards(const CodecOptions& options) : inner(make_codec("int4", options)) {}
  Packed pack(const Tensor& x, const PackContext& context) override { return inner->pack(x, context); }
  Tensor unpack(const Packed& packed) const override { return inner->unpack(packed); }
  std::optional<kernels::Coded> coded(const Packed& packed) const override { return inner->coded(packed); }
  int64_t packed_bytes(const Shape& shape, DType dtype, const Site& site) const override { return inner->packed_bytes(shape, dtype, site); }
  double error_bound(double lo, double hi) const override { return inner->error_bound(lo, hi); }
  std::map<std::string, Tensor> state() const override { return inner->state(); }
  void commit() override { inner->commit(); }
  void roll_back() override { inner->roll_back(); }
};

void register_codes_afterwards() {
  static bool once = false;
  if (std::exchange(once, true)) return;
  register_codec("afterwards", {"groups", "range"},
                 [](const CodecOptions& options) -> std::unique_ptr<Codec> { return std::make_unique<CodesAfterwards>(options); });
}

/// Leaves this much device memory beside what is in use, for as long as it lives.
struct ScarceMemory {
  explicit ScarceMemory(size_t bytes) {
    Allocator::of(kCuda).release_cached();
    emulation::set_device_limit(emulation::device_use().used + bytes);
  }
  ~ScarceMemory() { emulation::set_device_limit(size_t{4} << 30); }
};

}  // namespace

TEST_CASE("emulated GPU: forward and backward never wait for the device, whatever is kept", "[emulation]") {
  for (const char* storage : {"[{match: \"*\", codec: int8, groups: heads, range: running}]", "[{match: \"*\", codec: int4}]",
                              "[{match: \"*\", codec: exact}]", "[{match: \"*\", codec: int4}, {match: \"*fc1:x\", codec: host}]"})
    for (const char* precision : {"fp32", "bf16"}) {
      INFO(storage << ", " << precision);
      const RunConfig config = config_of({std::string("storage=") + storage, std::string("train.precision=") + precision});
      const NetConfig vit = model_config(config, 10);
      BuiltModel model(config, vit, kCuda);
      model.params.allocate_gradients();
      StoragePolicy policy = make_policy(config.storage);
      const Tensor images = to(normal_tensor({2, 3, 32, 32}, "images"), kCuda, MemoryKind::inputs);
      const Tensor labels = to(Tensor::from<int64_t>({2}, {3, 4}), kCuda, MemoryKind::inputs);
      for (int step = 0; step < 3; ++step) {
        policy.first_nonfinite();  // the counts of the last pass are read between steps
        Tape tape(policy, 1, step);
        const int64_t before = emulation::waits();
        const Var loss = cross_entropy(model.net(images), labels);
        tape.backward(loss);
        if (step > 0) CHECK(emulation::waits() == before);  // the first step takes memory and builds tables
        policy.first_nonfinite();
        CHECK((emulation::waits() > before) == (std::string(storage).find("exact") == std::string::npos));  // which has none to read
        CHECK(std::isfinite(loss.value().to_vector<double>()[0]));
        CHECK(emulation::waits() > before);  // the count does count
      }
    }
}

TEST_CASE("emulated GPU: attention in bf16 of heads of 32 or 64 is one kernel, to whatever it attends", "[emulation]") {
  const auto scores_in_memory = [](const std::string& model) {
    const RunConfig config = config_of({"train.precision=bf16"}, model);
    BuiltModel built(config, model_config(config, 10), kCuda);
    StoragePolicy policy = make_policy(config.storage);
    const std::map<std::string, int64_t> before = emulation::launches();
    Tape tape(policy, 1, 0);
    tape.backward(cross_entropy(built.net(to(normal_tensor({2, 3, 32, 32}, "images"), kCuda, MemoryKind::inputs)),
                                to(Tensor::from<int64_t>({2}, {3, 4}), kCuda, MemoryKind::inputs)));
    std::map<std::string, int64_t> counts = emulation::launches();
    for (const auto& [kernel, count] : before) counts[kernel] -= count;
    CHECK(counts["fused_attention"] == counts["fused_attention_grad (dk, dv)"]);
    return std::pair{counts["fused_attention"] > 0, counts["attention_softmax"] > 0};
  };
  CHECK(scores_in_memory("{name: vit, image_size: 32, patch_size: 8, width: 64, depth: 1, heads: 2, classes: 10}") ==
        std::pair{true, false});
  CHECK(scores_in_memory("{name: vit, image_size: 32, patch_size: 8, width: 64, depth: 1, heads: 4, classes: 10}") ==
        std::pair{false, true});
  CHECK(scores_in_memory("{name: swin, image_size: 32, patch_size: 4, width: 32, depths: [2], heads: 1, window: 4, classes: 10}") ==
        std::pair{true, false});
  CHECK(scores_in_memory("{name: pvt_tiny, image_size: 32, depths: [1, 1, 1, 1], classes: 10}") == std::pair{true, false});
}

TEST_CASE("emulated GPU: a block starts the passes over memory that its bytes are counted by, and no others", "[emulation][slow]") {
  // How often a step of so many blocks starts each kernel.
  const auto started = [](const std::string& storage, const std::string& drop_path, int depth) {
    const RunConfig config =
        config_of({"train.precision=bf16", "storage=" + storage, "model.drop_path=" + drop_path, concat("model.depth=", depth)});
    BuiltModel model(config, model_config(config, 10), kCuda);
    model.params.allocate_gradients();
    StoragePolicy policy = make_policy(config.storage);
    const Tensor images = to(normal_tensor({2, 3, 32, 32}, "images"), kCuda, MemoryKind::inputs);
    const Tensor labels = to(Tensor::from<int64_t>({2}, {3, 4}), kCuda, MemoryKind::inputs);
    std::map<std::string, int64_t> counts;
    for (int step = 0; step < 2; ++step) {  // the first makes what later ones find
      model.params.clear_gradients();
      const std::map<std::string, int64_t> before = emulation::launches();
      Tape tape(policy, 1, step);
      tape.backward(cross_entropy(model.net(images), labels));
      policy.commit();
      counts = emulation::launches();
      for (const auto& [kernel, count] : before) counts[kernel] -= count;
    }
    return counts;
  };
  const auto of_a_block = [&](const std::string& storage, const std::string& drop_path) {
    std::map<std::string, int64_t> counts = started(storage, drop_path, 4);
    for (const auto& [kernel, count] : started(storage, drop_path, 3)) counts[kernel] -= count;
    std::erase_if(counts, [](const auto& kernel) { return kernel.second == 0; });
    return counts;
  };
  using Kernels = std::map<std::string, int64_t>;
  const Kernels attention{{"fused_attention", 1}, {"fused_attention_grad (dk, dv)", 1}, {"fused_attention_grad (dq)", 1}};
  // Bytes are of one start, for an element of [B, N, C].
  Kernels exact{{"layer_norm", 2},        // 8
                {"gelu", 1},              // 16
                {"gelu_grad", 1},         // 32, with sums for the bias of fc1
                {"sum_rows", 4},          // which are added up, as those of the other biases that the kernels below make
                {"layer_norm_grad", 4}};  // 16; every second only adds up dgamma and dbeta
  // q, k, v and the attention's result are packed by passes of their own, and the last is decoded again.
  Kernels coded{{"layer_norm_codes", 2}, {"gelu_codes", 1},       {"gelu_grad_coded", 1}, {"sum_rows", 4},
                {"layer_norm_grad", 4},  {"quantize_current", 4}, {"dequantize", 1}};
  for (Kernels* of : {&exact, &coded}) of->insert(attention.begin(), attention.end());
  CHECK(of_a_block("exact", "0") == exact);
  CHECK(of_a_block("int8", "0") == coded);
  CHECK(of_a_block("int4", "0") == coded);
  // What drop path takes besides: 10 bytes each where a branch is masked and added. The gradient is masked by the layer norm behind.
  for (Kernels* of : {&exact, &coded}) of->emplace("add_drop_path", 2);
  CHECK(of_a_block("exact", "0.1") == exact);
  CHECK(of_a_block("int8", "0.1") == coded);
}

TEST_CASE("emulated GPU: codes that kernels write as they compute are those of values packed afterwards", "[emulation]") {
  register_codes_afterwards();
  for (const auto& [precision, groups, range] :
       {std::array{"fp32", "heads", "running"}, {"bf16", "heads", "running"}, {"fp32", "64", "current"}, {"bf16", "256", "current"}}) {
    CAPTURE(precision, groups);
    std::vector<std::vector<double>> gradients[2];
    std::map<std::string, std::vector<double>> ranges[2];
    for (const int which : {0, 1}) {
      const RunConfig config = config_of({concat("train.precision=", precision)});
      BuiltModel model(config, model_config(config, 10), kCuda);
      StoragePolicy policy("test", {{"*", which ? "afterwards" : "int4", {{"groups", groups}, {"range", range}}, ""}});
      const Tensor images = to(normal_tensor({2, 3, 32, 32}, "images"), kCuda, MemoryKind::inputs);
      const Tensor labels = to(Tensor::from<int64_t>({2}, {3, 4}), kCuda, MemoryKind::inputs);
      for (int step = 0; step < 4; ++step) {
        model.params.clear_gradients();
        Tape tape(policy, 1, step);
        tape.backward(cross_entropy(model.net(images), labels));
        step == 2 ? policy.roll_back() : policy.commit();
        for (const Param& p : model.params.params()) gradients[which].push_back(p.grad.to_vector<double>());
      }
      for (const auto& [name, range] : policy.state()) ranges[which][name] = range.to_vector<double>();
    }
    CHECK(gradients[0] == gradients[1]);
    CHECK((ranges[0].size() > 20) == (std::string(range) == "running"));
    CHECK(ranges[0] == ranges[1]);
  }
}

TEST_CASE("emulated GPU: each kind of pass is recorded once and run from its record", "[emulation]") {
  // 12 passes, of which two run as they are.
  const auto graphs = [](const std::vector<std::string>& sets) {
    std::vector<std::string> all{"train.batch_size=8", "data.train_size=48", "train.epochs=2", "train.steps=0", "train.cuda_graph=true"};
    all.insert(all.end(), sets.begin(), sets.end());
    const TemporaryFolder folder;
    RunConfig config = config_of(all);
    config.output = (folder.path() / "run").string();
    const int64_t made = emulation::graphs_made(), run = emulation::graph_launches();
    CHECK(train(config, {"", true}) == 0);
    return std::pair{emulation::graphs_made() - made, emulation::graph_launches() - run};
  };
  CHECK(graphs({}) == std::pair<int64_t, int64_t>{2, 10});                 // two phases of running ranges
  CHECK(graphs({"storage=exact"}) == std::pair<int64_t, int64_t>{1, 10});  // no ranges
  // Three batches an update: the first and the others of each phase, and one first before there was a second range.
  CHECK(graphs({"train.accumulation=3"}) == std::pair<int64_t, int64_t>{5, 10});
  // Updates of four and of two batches.
  const auto [made, run] = graphs({"train.accumulation=4", "train.epochs=3"});
  CHECK(run == 16);
  CHECK(made <= 8);
}

TEST_CASE("emulated GPU: what cannot be recorded is refused", "[emulation]") {
  const auto refusal = [](const std::vector<std::string>& sets) {
    std::vector<std::string> all{"train.cuda_graph=true"};
    all.insert(all.end(), sets.begin(), sets.end());
    RunConfig config = config_of(all);
    const TemporaryFolder folder;
    config.output = (folder.path() / "run").string();
    return error_of([&] { train(config, {"", true}); });
  };
  CHECK_THAT(refusal({"device=cpu"}), Contains("train.cuda_graph") && Contains("needs a GPU"));
  CHECK_THAT(refusal({"train.precision=bf16", "model.attention=cudnn"}), Contains("cudnn"));
  CHECK_THAT(refusal({"storage=[{match: \"*\", codec: host}]"}), Contains("train.cuda_graph") && Contains("codec: host"));
  setenv("MESA_OWN_BLOCKS", "1", 1);
  CHECK_THAT(refusal({}), Contains("train.cuda_graph") && Contains("MESA_OWN_BLOCKS"));
  unsetenv("MESA_OWN_BLOCKS");
  // A codec with ranges, but without phases.
  register_codes_afterwards();
  StoragePolicy policy("test", {{"*", "afterwards", {{"groups", "heads"}, {"range", "running"}}, ""}});
  policy.begin(1, 1);
  policy.save(normal_tensor({4, 8}, "x"), {"a", "x"}, nullptr);
  CHECK_THAT(error_of([&] { policy.phase(); }), Contains("afterwards") && Contains("a:x") && Contains("cannot be recorded"));
  // A wait, or a copy from the host's own memory, spoils a record.
  const Tensor host = Tensor::zeros({4}, DType::f32), there = to(host, kCuda);
  for (const bool waits : {false, true}) {
    cuda::begin_recording();
    if (waits)
      CHECK_THROWS_WITH(cuda::synchronize(), Contains("not permitted when stream is capturing"));
    else
      CHECK_THROWS_WITH(transfer(host, there), Contains("not permitted when stream is capturing"));
    CHECK_THROWS_WITH(cuda::end_recording(), Contains("recording work"));
  }
  cuda::begin_recording();
  kernels::fill(there, 7);
  const cuda::Recording work = cuda::end_recording();
  CHECK(there.to_vector<double>()[3] == 0);
  cuda::run(work);
  CHECK(there.to_vector<double>()[3] == 7);
}

TEST_CASE("emulated GPU: a run that does not fit says what would", "[emulation]") {
  const TemporaryFolder folder;
  RunConfig config = config_of({"model.patch_size=4"});
  config.output = (folder.path() / "run").string();
  const ScarceMemory scarce(12 << 20);
  const std::string error = error_of([&] { train(config, {"", true}); });
  CHECK_THAT(error, Contains("out of memory on cuda") && Contains("the plan of train.batch_size 64") && Contains("keeping most: "));
  const std::string says = "train.batch_size=";
  REQUIRE_THAT(error, Contains(says) && Contains("would fit"));
  const int64_t batch = std::stoll(error.substr(error.find(says) + says.size()));
  CHECK((batch >= 1 && batch < 64));
  // And so it does.
  Allocator::of(kCuda).release_cached();
  config.train.batch_size = batch;
  config.output = (folder.path() / "smaller").string();
  CHECK(train(config, {"", true}) == 0);
}

TEST_CASE("emulated GPU: a step that is not finite is told and skipped where its exact values do not fit", "[emulation][slow]") {
  const TemporaryFolder folder;
  const auto run = [&](const std::string& codec) {
    RunConfig config = config_of({"model.patch_size=4", concat("storage=[{match: \"*\", codec: ", codec, "}]"), "optimizer.lr=1e15",
                                  "train.steps=4", "train.max_bad_steps=2"});
    config.output = (folder.path() / codec).string();
    return train(config, {"", true});
  };
  const ScarceMemory scarce(24 << 20);
  CHECK_THAT(error_of([&] { run("exact"); }), Contains("out of memory on cuda"));
  CHECK(run("int2") == 1);
  CHECK_THAT(read_text((folder.path() / "int2/log.txt").string()),
             Contains("the first bad value is in ") && Contains("2 steps in a row were not finite"));
}

TEST_CASE("emulated GPU: a run that ends within an epoch evaluates in the memory that one at an epoch's end needs", "[emulation]") {
  const TemporaryFolder folder;
  const auto peak = [&](int64_t steps) {
    RunConfig config = config_of({"data.train_size=64", "train.batch_size=8", "train.eval_batch_size=64", concat("train.steps=", steps)});
    config.output = (folder.path() / std::to_string(steps)).string();
    REQUIRE(train(config, {"", true}) == 0);
    return nlohmann::json::parse(read_text(config.output + "/summary.json")).at("peak_bytes").get<int64_t>();
  };
  const int64_t within = peak(3), at_end = peak(8);
  CHECK(std::abs(within - at_end) < 8 * 32 * 32 * 3);  // a batch; small tables stay from run to run
}

TEST_CASE("emulated GPU: memory goes back to the driver when the GPU is done with it", "[emulation]") {
  auto cache = Allocator::of(kCuda).new_cache();
  const int64_t before = emulation::waits();
  {
    const Allocator::Using own(Allocator::of(kCuda), cache);
    Tensor::zeros({1 << 20}, DType::f32, kCuda);
  }
  CHECK(emulation::waits() == before);
  cache.reset();
  CHECK(emulation::waits() > before);
}

TEST_CASE("emulated GPU: nothing is allocated after the second step, on the device or pinned", "[emulation][slow]") {
  for (const char* storage :
       {"[{match: \"*\", codec: int8, groups: heads, range: running}]", "[{match: \"*\", codec: int4}]", "[{match: \"*\", codec: host}]"}) {
    INFO(storage);
    const auto allocations = [&](int steps) {
      const TemporaryFolder folder;
      RunConfig config = config_of({std::string("storage=") + storage, concat("train.steps=", steps), "train.batch_size=16"});
      config.output = (folder.path() / "run").string();
      const auto count = [] {
        return std::pair{Allocator::of(kCuda).use().system_allocations, Allocator::of(kPinned).use().system_allocations};
      };
      Allocator::of(kCuda).release_cached();
      Allocator::of(kPinned).release_cached();
      const auto before = count();
      CHECK(train(config, {"", true}) == 0);
      return std::pair{count().first - before.first, count().second - before.second};
    };
    allocations(1);  // takes what lasts for all runs of a process
    const auto two = allocations(2);
    CHECK(two.second > 0);
    CHECK(allocations(7) == two);
  }
}

TEST_CASE("emulated GPU: the next batch of an evaluation is sent before the pass over the one before it starts", "[emulation]") {
  const RunConfig config = config_of({"data.test_size=40"});
  const NetConfig net = model_config(config, 10);
  const BuiltModel model(config, net, kCuda);
  const TransformOptions transform = make_transform(config, net.input());
  Loader loader(make_datasets(config, net.input()).test, transform, LoaderOptions::evaluation(8));
  const auto started = [] {
    int64_t sum = 0;
    for (const auto& [name, times] : emulation::launches()) sum += times;
    return sum;
  };
  std::vector<int64_t> sent, passed{started()};  // kernels that had been started when pictures were sent, and when a pass had ended
  emulation::tell_of_copies([&](size_t bytes) {
    if (bytes == size_t{8} * 32 * 32 * 3) sent.push_back(started());
  });
  evaluate(model, loader, transform, {}, [&](int64_t) { passed.push_back(started()); });
  emulation::tell_of_copies(nullptr);
  REQUIRE(sent.size() == 5);
  REQUIRE(passed.size() == 6);
  CHECK(sent[0] == passed[0]);
  for (size_t k = 1; k < sent.size(); ++k) {
    CHECK(sent[k] == passed[k - 1]);
    CHECK(passed[k] > passed[k - 1]);
  }
}

TEST_CASE("emulated GPU: parameters that do not fit are an error that says so, too", "[emulation]") {
  const TemporaryFolder folder;
  RunConfig config = config_of({"model.width=256", "model.patch_size=4"});
  config.output = (folder.path() / "run").string();
  const ScarceMemory scarce(1 << 20);
  CHECK_THAT(error_of([&] {
               train(config, {"", true});
             }),
             Contains("out of memory on cuda") && Contains("not even a batch of 1 would fit"));
}

namespace {

/// Keeps everything, and loses the device at its 50th value.
struct LosesDevice : Codec {
  std::unique_ptr<Codec> inner = make_codec("exact", {});
  Packed pack(const Tensor& x, const PackContext& context) override {
    static int left = 50;
    if (left-- == 0) emulation::lose_device(true);
    return inner->pack(x, context);
  }
  Tensor unpack(const Packed& packed) const override { return inner->unpack(packed); }
  int64_t packed_bytes(const Shape& shape, DType dtype, const Site& site) const override { return inner->packed_bytes(shape, dtype, site); }
  double error_bound(double lo, double hi) const override { return inner->error_bound(lo, hi); }
};

}  // namespace

TEST_CASE("emulated GPU: a device that is lost ends the run with that error and its place", "[emulation]") {
  register_codec("loses", {}, [](const CodecOptions&) -> std::unique_ptr<Codec> { return std::make_unique<LosesDevice>(); });
  const TemporaryFolder folder;
  RunConfig config = config_of({"storage=[{match: \"*\", codec: loses}]", "train.steps=8", "train.batch_size=8"});
  config.output = (folder.path() / "run").string();
  std::string error;
  try {
    train(config, {"", true});
  } catch (const Error& e) {
    error = e.what();
  }
  emulation::lose_device(false);
  CHECK_THAT(error, Contains("an illegal memory access") && Contains("(at epoch 1, step "));
}

// Run by the test behind it, in a process of its own: MESA_SYNC is read once.
TEST_CASE("emulated GPU: errors of a lost device", "[.lost]") {
  if (std::getenv("MESA_SYNC") == nullptr) return;
  const Tensor x = to(normal_tensor({8, 8}, "x"), kCuda), y = empty_like(x);
  emulation::lose_device(true);
  const Scope scope("blocks.3.mlp");
  CHECK_THROWS_WITH(kernels::gelu(x, y), Contains("blocks.3.mlp: cuda: gelu: an illegal memory access"));
  CHECK_THROWS_WITH(kernels::matmul(x, x, y, {}, {}), Contains("blocks.3.mlp: cuda: a product by cuBLASLt: an illegal memory access"));
  emulation::lose_device(false);
}

TEST_CASE("emulated GPU: with MESA_SYNC an error names the kernel or product that made it, and the site", "[emulation]") {
  const std::string self = std::filesystem::read_symlink("/proc/self/exe").string();
  const ProcessResult with = run(self, {"[.lost]"}, {{"MESA_SYNC", "1"}}), without = run(self, {"[.lost]"}, {{"MESA_SYNC", "0"}});
  INFO(with.out);
  CHECK(with.code == 0);
  CHECK(without.code == 2);  // nobody waits, and so nobody is told
}
