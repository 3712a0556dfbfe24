// Whether cuDNN takes the graphs of attention and of convolutions, asked without a GPU: from the properties of one it does everything up to
// loading the code.
#include <dlfcn.h>

#include <catch2/catch.hpp>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "mesa/base/cuda.h"
#include "mesa/kernels/attention.h"
#include "mesa/kernels/conv.h"

// LeakSanitizer, where the tests are built with it: libraries that cuDNN opens and closes again forget some memory.
extern "C" [[gnu::weak]] void __lsan_disable();
extern "C" [[gnu::weak]] void __lsan_enable();

namespace {

using mesa::kernels::cuda::cudnn_attention_support;

/// Opens the driver's library before cuDNN looks for it by name (libcuda.so.1): the driver's own or, where there is none, the stub that the
/// toolkit links against, which bears that name inside and whose functions all fail.
bool open_driver_library() {
  mesa::cuda::unavailable();  // asks once and remembers, so that nobody else in this process gets the stub's answer
  if (dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL) != nullptr) return true;
  std::vector<std::string> roots{"/usr/local/cuda", "/opt/cuda", "/usr/lib/cuda"};
  for (const char* name : {"CUDA_HOME", "CUDA_PATH"})
    if (const char* root = std::getenv(name)) roots.insert(roots.begin(), root);
  for (const std::string& root : roots)
    for (const char* folder : {"/lib64/stubs", "/lib/stubs", "/targets/x86_64-linux/lib/stubs", "/targets/sbsa-linux/lib/stubs"})
      if (dlopen((root + folder + "/libcuda.so").c_str(), RTLD_NOW | RTLD_GLOBAL) != nullptr) return true;
  return false;
}

/// What `ask` answers for an H200.
template <class F>
std::string answer(const F& ask) {
  std::ifstream file(MESA_SOURCE_DIR "/tests/emulation/h200.json");
  REQUIRE(file.good());
  std::ostringstream properties;
  properties << file.rdbuf();
  if (__lsan_disable != nullptr) __lsan_disable();
  const std::string reason = ask(properties.str());
  if (__lsan_enable != nullptr) __lsan_enable();
  return reason;
}

/// Why an H200 would not run attention of these extents, or "".
std::string refusal(int64_t B, int64_t H, int64_t N, int64_t D, bool backward) {
  return answer([=](const std::string& gpu) { return cudnn_attention_support(gpu, B, H, N, D, backward); });
}

/// True if the question can be asked here; says why not otherwise.
bool can_ask() {
  if (cudnn_attention_support == nullptr)
    WARN("this build has no cuDNN: its attention is not checked");
  else if (!open_driver_library())
    WARN("no libcuda.so.1 and no stub of it: attention by cuDNN is not checked");
  else
    return true;
  return false;
}

struct Model {
  const char* name;
  int64_t B, H, N, D;
};

}  // namespace

TEST_CASE("cudnn: an H200 gets forward and deterministic backward attention for the models' shapes") {
  if (!can_ask()) return;
  for (const Model& m : {Model{"DeiT-S", 128, 6, 197, 64},
                         {"DeiT-B", 128, 12, 197, 64},
                         {"DeiT at 384 px", 128, 6, 577, 64},
                         {"Swin's first stage", 8192, 3, 49, 32}})
    for (const bool backward : {false, true}) {
      INFO(m.name << (backward ? ", backward" : ", forward"));
      CHECK(refusal(m.B, m.H, m.N, m.D, backward) == "");
    }
}

TEST_CASE("cudnn: attention that no engine takes is refused with the reason") {
  if (!can_ask()) return;
  for (const bool backward : {false, true}) CHECK_THAT(refusal(2, 3, 197, 12, backward), Catch::Contains("head of 12 channels"));
  CHECK_THAT(refusal(2, 3, 1, 64, true), Catch::Contains("single token"));
  CHECK_THAT(refusal(2, 3, 197, 264, true), Catch::Contains("256"));  // cuDNN's own answer
}

TEST_CASE("cudnn: an H200 gets deterministic convolutions, forward and both gradients, for the models' shapes") {
  if (!can_ask()) return;
  struct Layer {
    const char* name;
    int64_t I, O;
    mesa::kernels::ConvGeometry g;
  };
  for (const Layer& c : {Layer{"ResNet's stem", 3, 64, {224, 224, 7, 7, 2, 3}},
                         {"its first stage", 64, 64, {56, 56, 3, 3, 1, 1}},
                         {"its second stage, halving", 128, 128, {56, 56, 3, 3, 2, 1}},
                         {"a shortcut, halving", 256, 512, {56, 56, 1, 1, 2}},
                         {"its last stage", 512, 512, {7, 7, 3, 3, 1, 1}},
                         {"dilated", 256, 256, {14, 14, 3, 3, 1, 2, 2}},
                         {"in groups", 256, 256, {28, 28, 3, 3, 1, 1, 1, 32}},
                         {"depthwise", 96, 96, {28, 28, 7, 7, 1, 3, 1, 96}},
                         {"of odd extents", 5, 7, {13, 9, 3, 3, 2, 1}}})
    for (const mesa::DType dtype : {mesa::DType::bf16, mesa::DType::f32}) {
      INFO(c.name << " in " << mesa::to_string(dtype));
      CHECK(answer([&](const std::string& gpu) { return mesa::kernels::cuda::cudnn_conv_support(gpu, c.g, 32, c.I, c.O, dtype); }) == "");
    }
}
