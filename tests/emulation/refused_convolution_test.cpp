// What becomes of a convolution when cuDNN, or the stand-in for it, cannot do it.
#include <catch2/catch.hpp>
#include <cstdlib>
#include <filesystem>

#include "cudnn_troubles.h"
#include "emulator.h"
#include "mesa/base/cuda_profile.h"
#include "mesa/kernels/attention.h"
#include "mesa/kernels/conv.h"
#include "mesa/kernels/elementwise.h"
#include "support/gradcheck.h"
#include "support/process.h"
#include "support/random.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

constexpr int kFirst = 3, kFallback = 2;                    // CUDNN_HEUR_MODE_A, CUDNN_HEUR_MODE_FALLBACK
constexpr int kNotSupported = 3000, kInternalError = 4000;  // of cudnnStatus_t
constexpr int kTensorCore = 0, kNondeterministic = 4;       // of cudnnBackendNumericalNote_t
constexpr int64_t kVast = int64_t{1} << 40;

struct Troubled {
  explicit Troubled(const emulation::CudnnTroubles& troubles) { emulation::cudnn_troubles() = troubles; }
  ~Troubled() { emulation::cudnn_troubles() = {}; }
};

}  // namespace

TEST_CASE("emulated GPU: where one of cuDNN's heuristics takes no graph, another is asked", "[emulation]") {
  if (kernels::cuda::cudnn_conv_support == nullptr) return;
  const auto support = [](const std::map<int, int>& failing) {
    const Troubled troubled({failing});
    return kernels::cuda::cudnn_conv_support("{}", {8, 8, 3, 3, 1, 1}, 2, 16, 16, DType::f32);
  };
  CHECK(support({}) == "");
  CHECK(support({{kFallback, kNotSupported}}) == "");
  CHECK(support({{kFirst, kNotSupported}}) == "");
  CHECK(support({{kFirst, kInternalError}}) == "");
  for (const int status : {kNotSupported, kInternalError})
    CHECK_THAT(support({{kFirst, status}, {kFallback, status}}), Contains("forward: ") && Contains("this heuristic takes no graph"));
}

TEST_CASE("emulated GPU: no engine rounds f32 operands to TF32, and none that is not deterministic is taken", "[emulation]") {
  if (kernels::cuda::cudnn_conv_support == nullptr) return;
  const auto support = [](int note, DType dtype) {
    const Troubled troubled({.heuristics = {}, .notes = {note}});
    return kernels::cuda::cudnn_conv_support("{}", {8, 8, 3, 3, 1, 1}, 2, 16, 16, dtype);
  };
  CHECK(support(kTensorCore, DType::bf16) == "");
  CHECK_THAT(support(kTensorCore, DType::f32), Contains("no engine takes the graph"));
  for (const DType dtype : {DType::bf16, DType::f32}) CHECK_THAT(support(kNondeterministic, dtype), Contains("no engine takes the graph"));
}

TEST_CASE("emulated GPU: a convolution that cuDNN cannot run, or not in little memory, is done by products, and that is told",
          "[emulation]") {
  if (kernels::cuda::cudnn_conv_support == nullptr) return;
  const auto on_gpu = [](const Shape& shape, const char* name) { return to(normal_tensor(shape, name, DType::f32), kCuda); };
  int64_t size = 6;
  const auto check = [&](const emulation::CudnnTroubles& troubles, bool by_cudnn, const char* reason, int tried) {
    const kernels::ConvGeometry g{size, size, 3, 3, 1, 1};  // another each time: plans are kept
    const Tensor x = on_gpu({2, size * size, 8}, "x"), w = on_gpu({8, 8, 3, 3}, "w"), y = empty_like(x), again = empty_like(x);
    ++size;
    const auto unfolded = [] { return std::map<std::string, int64_t>(emulation::launches())["unfold"]; };
    const int64_t before = unfolded();
    const size_t told = kernels::slow_convolutions().size();
    int runs = 0;
    {
      const Troubled troubled(troubles);
      kernels::conv2d(x, w, {}, y, g);
      kernels::conv2d(x, w, {}, again, g);
      runs = emulation::cudnn_troubles().runs;
    }
    CHECK(unfolded() - before == (by_cudnn ? 0 : 2));
    CHECK(runs == tried);
    REQUIRE(kernels::slow_convolutions().size() == told + (by_cudnn ? 0 : 1));
    if (!by_cudnn) CHECK_THAT(kernels::slow_convolutions().back(), Contains("forward, [2, 8, ") && Contains(reason));
    const Tensor host = to(x, kCpu), want = empty_like(host);
    kernels::conv2d(host, to(w, kCpu), {}, want, g);
    CHECK(relative_error(y.to_vector<double>(), want.to_vector<double>()) < 1e-6);
    CHECK(y.to_vector<double>() == again.to_vector<double>());
  };
  check({}, true, "", 2);
  check({{{kFirst, kInternalError}}}, true, "", 2);
  check({{{kFirst, kInternalError}, {kFallback, kNotSupported}}}, false, "this heuristic takes no graph", 0);
  check({.heuristics = {}, .workspace = kVast}, false, "a workspace of 1099511627776 bytes", 0);
  check({.heuristics = {}, .running = kNotSupported}, false, "CUDNN_STATUS", 1);
}

TEST_CASE("emulated GPU: where cuDNN finds no memory for itself, that is said, and no slower way taken for good", "[emulation]") {
  if (kernels::cuda::cudnn_conv_support == nullptr) return;
  constexpr int kNoMemory = 4004;                   // CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
  const kernels::ConvGeometry g{5, 7, 3, 3, 1, 1};  // of no other test: plans are kept
  const Tensor x = to(normal_tensor({2, 35, 8}, "x", DType::f32), kCuda), w = to(normal_tensor({8, 8, 3, 3}, "w", DType::f32), kCuda);
  const Tensor y = empty_like(x);
  const size_t told = kernels::slow_convolutions().size();
  for (const emulation::CudnnTroubles& troubles : {emulation::CudnnTroubles{.heuristics = {{kFirst, kNoMemory}}},
                                                   {.heuristics = {}, .planning = kNoMemory},
                                                   {.heuristics = {}, .running = kNoMemory}}) {
    const Troubled troubled(troubles);
    CHECK_THROWS_AS(kernels::conv2d(x, w, {}, y, g), OutOfMemory);
  }
  kernels::conv2d(x, w, {}, y, g);
  CHECK(emulation::cudnn_troubles().runs == 1);
  CHECK(kernels::slow_convolutions().size() == told);
}

TEST_CASE("emulated GPU: a batch for which a fast engine wants too much workspace is taken in parts", "[emulation]") {
  if (kernels::cuda::cudnn_conv_support == nullptr) return;
  constexpr int64_t kEach = int64_t{200} << 20;  // two images at a time: 512 MiB are allowed
  int64_t size = 5;
  // What three passes give, against the CPU; `runs`: how often cuDNN runs for each.
  const auto check = [&](const emulation::CudnnTroubles& troubles, DType dtype, int64_t batch, int64_t channels, int runs,
                         const char* told) {
    const kernels::ConvGeometry g{size, 7, 3, 3, 1, 1};  // another each time: plans are kept
    const int64_t tokens = size * 7;
    size += 2;
    CAPTURE(to_string(dtype), batch, channels, tokens);
    const auto gradients = [&](Device device) {
      const auto of = [&](const Shape& shape, const char* name, DType type) { return to(normal_tensor(shape, name, type), device); };
      const Tensor x = of({batch, tokens, channels}, "x", dtype), dy = of({batch, tokens, 16}, "dy", dtype);
      const Tensor w = of({16, channels, 3, 3}, "w", DType::f32), dw = of({16, channels, 3, 3}, "before", DType::f32);
      const Tensor y = empty_like(dy), dx = empty_like(x);
      kernels::conv2d(x, w, {}, y, g);
      kernels::conv2d_data_grad(dy, w, dx, g);
      kernels::conv2d_weight_grad(dy, x, dw, true, g);
      return std::vector<Tensor>{y, dx, dw};
    };
    const std::vector<Tensor> want = gradients(kCpu);
    const size_t before = kernels::slow_convolutions().size();
    const Troubled troubled(troubles);
    const std::vector<Tensor> got = gradients(kCuda);
    CHECK(emulation::cudnn_troubles().runs == 3 * runs);
    if (told == nullptr) CHECK(emulation::cudnn_troubles().plans == 3 * 4);  // for 5, 3, 2 and 1: no slower ones
    REQUIRE((kernels::slow_convolutions().size() > before) == (told != nullptr));
    if (told != nullptr) CHECK_THAT(kernels::slow_convolutions().back(), Contains(told));
    for (size_t i = 0; i < want.size(); ++i)
      CHECK(relative_error(got[i].to_vector<double>(), want[i].to_vector<double>()) < (dtype == DType::f32 ? 1e-6 : 5e-3));
  };
  const emulation::CudnnTroubles crowded{.heuristics = {}, .workspace_each = kEach};
  for (const DType dtype : {DType::f32, DType::bf16}) check(crowded, dtype, 5, 8, 3, nullptr);  // 2, 2 and 1
  // Where one image alone wants too much, or parts would not begin at 16 bytes, all are left to a slower engine.
  const char* const slower = "faster engines want a workspace of";
  check({.heuristics = {}, .workspace_each = kVast, .fallback_wants_none = true}, DType::f32, 4, 8, 1, slower);
  check({.heuristics = {}, .workspace_each = kEach, .fallback_wants_none = true}, DType::bf16, 4, 3, 1, slower);
  check(crowded, DType::bf16, 4, 3, 0, "a workspace of");
  // So they are where cuDNN refuses a part after all; here it refuses that engine, too.
  check({.heuristics = {}, .running = kNotSupported, .workspace_each = kEach, .fallback_wants_none = true}, DType::f32, 4, 8, 2,
        "CUDNN_STATUS");
}

// Run by the test behind it, in a process of its own: cuDNN starts once.
TEST_CASE("emulated GPU: a convolution where cuDNN does not start", "[.no_start]") {
  if (std::getenv("MESA_TEST_NO_START") == nullptr) return;
  const Troubled troubled({.heuristics = {}, .handles = false});
  const Tensor x = to(normal_tensor({2, 36, 8}, "x", DType::f32), kCuda), w = to(normal_tensor({8, 8, 3, 3}, "w", DType::f32), kCuda);
  for (int i = 0; i < 2; ++i) kernels::conv2d(x, w, {}, empty_like(x), {6, 6, 3, 3, 1, 1});
  CHECK(std::map<std::string, int64_t>(emulation::launches())["unfold"] == 2);
  REQUIRE(kernels::slow_convolutions().size() == 1);
  CHECK_THAT(kernels::slow_convolutions()[0], Contains("all: cuDNN: starting"));
}

TEST_CASE("emulated GPU: where cuDNN does not start, convolutions are done by products", "[emulation]") {
  if (kernels::cuda::cudnn_conv_support == nullptr) return;
  const ProcessResult result =
      run(std::filesystem::read_symlink("/proc/self/exe").string(), {"[.no_start]"}, {{"MESA_TEST_NO_START", "1"}});
  INFO(result.out);
  CHECK(result.code == 0);
}

TEST_CASE("emulated GPU: a profile names what cuDNN runs", "[emulation]") {
  if (kernels::cuda::cudnn_conv_support == nullptr) return;
  const auto on_gpu = [](const Shape& shape, DType type) { return to(normal_tensor(shape, "x", type), kCuda); };
  const Tensor x = on_gpu({2, 25, 8}, DType::f32), w = on_gpu({8, 8, 3, 3}, DType::f32), q = on_gpu({1, 4, 16}, DType::bf16);
  cuda::start_profile();
  kernels::conv2d(x, w, {}, empty_like(x), {5, 5, 3, 3, 1, 1});
  kernels::attention(q, q, q, 2, 0.3, empty_like(q), Tensor::empty({1, 2, 4}, DType::f32, kCuda), kernels::AttentionBy::cudnn);
  int found = 0;
  for (const cuda::ProfileRow& row : cuda::end_profile())
    found +=
        row.name == "convolution by cuDNN: forward, [2, 8, 5, 5] by [8, 8, 3, 3], stride 1, in fp32" || row.name == "attention by cuDNN";
  CHECK(found == 2);
}
