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

TEST_CASE("emulated GPU: a batch for which a fast engine wants too much workspace is taken in parts", "[emulation]") {
  if (kernels::cuda::cudnn_conv_support == nullptr) return;
  const kernels::ConvGeometry g{5, 7, 3, 3, 1, 1};
  const auto gradients = [&g](Device device) {
    const auto of = [device](const Shape& shape, const char* name) { return to(normal_tensor(shape, name, DType::f32), device); };
    const Tensor x = of({3, 35, 8}, "x"), w = of({16, 8, 3, 3}, "w"), dy = of({3, 35, 16}, "dy"), dw = of({16, 8, 3, 3}, "before");
    const Tensor y = empty_like(dy), dx = empty_like(x);
    kernels::conv2d(x, w, {}, y, g);
    kernels::conv2d_data_grad(dy, w, dx, g);
    kernels::conv2d_weight_grad(dy, x, dw, true, g);
    return std::vector<Tensor>{y, dx, dw};
  };
  const size_t told = kernels::slow_convolutions().size();
  const std::vector<Tensor> want = gradients(kCpu);
  std::vector<Tensor> got;
  {
    const Troubled troubled({.heuristics = {}, .workspace_each = int64_t{300} << 20});  // of at most 512 MiB
    got = gradients(kCuda);
    CHECK(emulation::cudnn_troubles().runs == 3 * 3);
  }
  CHECK(kernels::slow_convolutions().size() == told);
  for (size_t i = 0; i < want.size(); ++i) CHECK(relative_error(got[i].to_vector<double>(), want[i].to_vector<double>()) < 1e-6);

  // Where one image alone wants too much, all are left to a slower engine, and that is told.
  const Troubled troubled({.heuristics = {}, .workspace_each = kVast, .fallback_wants_none = true});
  const Tensor x = to(normal_tensor({4, 35, 8}, "x", DType::f32), kCuda), w = to(normal_tensor({8, 8, 3, 3}, "w", DType::f32), kCuda);
  kernels::conv2d(x, w, {}, empty_like(x), g);
  CHECK(emulation::cudnn_troubles().runs == 1);
  REQUIRE(kernels::slow_convolutions().size() == told + 1);
  CHECK_THAT(kernels::slow_convolutions().back(), Contains("forward, [4, 8, 5, 7]") && Contains("faster engines want a workspace of"));
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
