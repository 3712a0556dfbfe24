// Convolutions by cuDNN: y = x * w, dx = dy * w^T, dw = x * dy, each a graph of one operation in nhwc, planned for each shape once.
// All tensors have one dtype, dw included: of bf16 operands cuDNN 9.19 has no engine with an f32 dw. Sums run in f32.
#include <algorithm>
#include <map>
#include <optional>

#include "cudnn_graph.h"
#include "mesa/base/cuda.h"
#include "mesa/base/cuda_profile.h"
#include "mesa/kernels/conv.h"

namespace mesa::kernels::cuda {

// As src/kernels/conv.cpp declares them.
bool cudnn_conv(const Tensor& x, const Tensor& w, const Tensor& y, const ConvGeometry& geometry);
bool cudnn_conv_data_grad(const Tensor& dy, const Tensor& w, const Tensor& dx, const ConvGeometry& geometry);
bool cudnn_conv_weight_grad(const Tensor& dy, const Tensor& x, const Tensor& dw, const ConvGeometry& geometry);
std::vector<std::string> cudnn_slow_convolutions();

namespace {

using cudnn::Extents;
using cudnn::Graph;
using cudnn::Plan;
using cudnn::Value;

enum class Pass { forward, data, weights };
enum Uid : int64_t { kX = 1, kW, kY };

/// What a plan is made for.
struct Case {
  Pass pass;
  int64_t B, I, O;
  ConvGeometry g;
  DType dtype;
  auto operator<=>(const Case&) const = default;
};

/// A tensor whose channels lie innermost, as cuDNN's [n, c, h, w].
Value channels_last(Graph& graph, Uid uid, cudnnDataType_t type, int64_t n, int64_t c, int64_t h, int64_t w) {
  return graph.tensor(uid, type, {n, c, h, w}, {h * w * c, 1, w * c, c});
}

Graph graph_of(const Case& c) {
  const cudnnDataType_t type = c.dtype == DType::bf16 ? CUDNN_DATA_BFLOAT16 : CUDNN_DATA_FLOAT;
  const cudnn::Sliding by{c.g.stride, c.g.padding, c.g.dilation};
  Graph graph;
  const Value x = channels_last(graph, kX, type, c.B, c.I, c.g.height, c.g.width);
  const Value w = channels_last(graph, kW, type, c.O, c.I / c.g.groups, c.g.kernel_height, c.g.kernel_width);
  const Value y = channels_last(graph, kY, type, c.B, c.O, c.g.out_height(), c.g.out_width());
  if (c.pass == Pass::forward)
    graph.convolve(x, w, y, by);
  else if (c.pass == Pass::data)
    graph.convolve_data_grad(y, w, x, by);
  else
    graph.convolve_weight_grad(y, x, w, by);
  return graph;
}

/// Results that repeat bit for bit, and of f32 operands sums of f32 products, as elsewhere: tensor cores would round them to TF32 (which
/// cuDNN 9.19 notes by nothing else), and by transforms (Winograd's, Fourier's) they are less exact. No plan of a run has cuDNN's
/// workspace.
cudnn::Engines engines(DType dtype) {
  cudnn::Engines out{
      {CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC, CUDNN_NUMERICAL_NOTE_DOWN_CONVERT_INPUTS, CUDNN_NUMERICAL_NOTE_REDUCED_PRECISION_REDUCTION,
       CUDNN_NUMERICAL_NOTE_FFT, CUDNN_NUMERICAL_NOTE_WINOGRAD, CUDNN_NUMERICAL_NOTE_WINOGRAD_TILE_4x4,
       CUDNN_NUMERICAL_NOTE_WINOGRAD_TILE_6x6, CUDNN_NUMERICAL_NOTE_WINOGRAD_TILE_13x13},
      true,
      int64_t{512} << 20};
  if (dtype == DType::f32) out.without.push_back(CUDNN_NUMERICAL_NOTE_TENSOR_CORE);
  return out;
}

std::vector<std::string>& slow_convolutions() {
  static std::vector<std::string>& all = *new std::vector<std::string>;
  return all;
}
void note_slow(const std::string& text) {
  std::vector<std::string>& all = slow_convolutions();
  if (std::find(all.begin(), all.end(), text) == all.end()) all.push_back(text);
}
std::string to_string(const Case& c) {
  const char* const passes[] = {"forward", "gradient of x", "gradient of w"};
  return concat(passes[static_cast<int>(c.pass)], ", [", c.B, ", ", c.I, ", ", c.g.height, ", ", c.g.width, "] by [", c.O, ", ",
                c.I / c.g.groups, ", ", c.g.kernel_height, ", ", c.g.kernel_width, "], stride ", c.g.stride, ", in ",
                mesa::to_string(c.dtype));
}
void note_slow(const Case& c, const std::string& reason) { note_slow(concat(to_string(c), ": ", reason)); }

/// Empty where there is no engine.
std::optional<Plan>& plan_of(const Case& c, cudnnHandle_t on) {
  static std::map<Case, std::optional<Plan>>& plans = *new std::map<Case, std::optional<Plan>>;
  if (const auto found = plans.find(c); found != plans.end()) return found->second;
  std::optional<Plan> plan;
  try {
    plan.emplace(graph_of(c), on, engines(c.dtype));
  } catch (const cudnn::Unsupported& reason) {
    note_slow(c, reason.what());
  }
  return plans.emplace(c, std::move(plan)).first->second;
}

bool run(Pass pass, const Tensor& x, const Tensor& w, const Tensor& y, const ConvGeometry& g) {
  const Case c{pass, x.dim(0), x.dim(2), y.dim(2), g, x.dtype()};
  cudnn::Library& library = cudnn::Library::get();
  const std::lock_guard lock(library.mutex);
  if (cudnnGetVersion() == 0) return note_slow("all, since cuDNN was not found"), false;
  for (const Tensor* t : {&x, &w, &y})
    if (reinterpret_cast<uintptr_t>(t->raw()) % 16 != 0) return note_slow(c, "operands that do not begin at multiples of 16 bytes"), false;
  static bool starts = true;  // unless a part of cuDNN is missing, say
  if (!starts) return false;
  cudnnHandle_t handle = nullptr;
  try {
    handle = library.handle_on(mesa::cuda::stream());
  } catch (const OutOfMemory&) {
    throw;
  } catch (const Error& reason) {
    note_slow(concat("all: ", reason.what()));
    return starts = false;
  }
  std::optional<Plan>& plan = plan_of(c, handle);
  if (!plan) return false;
  Tensor workspace;
  try {
    workspace = Tensor::empty({plan->workspace_bytes()}, DType::u8, x.device());
  } catch (const OutOfMemory&) {  // no plan of a run has it
    return note_slow(c, concat("no memory for a workspace of ", plan->workspace_bytes(), " bytes")), false;
  }
  const mesa::cuda::Timed timed(mesa::cuda::profiling() ? "convolution by cuDNN: " + to_string(c) : "");
  try {
    plan->run(handle, {{kX, x.raw()}, {kW, w.raw()}, {kY, y.raw()}}, workspace.raw());
  } catch (const cudnn::Unsupported& reason) {  // of what it had planned
    note_slow(c, reason.what());
    plan.reset();
    return false;
  }
  if (mesa::cuda::synchronous()) mesa::cuda::synchronize("a convolution by cuDNN");
  return true;
}

}  // namespace

bool cudnn_conv(const Tensor& x, const Tensor& w, const Tensor& y, const ConvGeometry& g) { return run(Pass::forward, x, w, y, g); }

bool cudnn_conv_data_grad(const Tensor& dy, const Tensor& w, const Tensor& dx, const ConvGeometry& g) {
  return run(Pass::data, dx, w, dy, g);
}

bool cudnn_conv_weight_grad(const Tensor& dy, const Tensor& x, const Tensor& dw, const ConvGeometry& g) {
  return run(Pass::weights, x, dw, dy, g);
}

std::vector<std::string> cudnn_slow_convolutions() {
  const std::lock_guard lock(cudnn::Library::get().mutex);
  return slow_convolutions();
}

std::string cudnn_conv_support(const std::string& device_properties, const ConvGeometry& g, int64_t B, int64_t I, int64_t O, DType dtype) {
  for (const auto& [pass, name] :
       {std::pair{Pass::forward, "forward"}, {Pass::data, "data gradient"}, {Pass::weights, "weight gradient"}}) {
    try {
      Plan::check_support(graph_of({pass, B, I, O, g, dtype}), device_properties, engines(dtype));
    } catch (const cudnn::Unsupported& reason) {
      return concat(name, ": ", reason.what());
    }
  }
  return "";
}

}  // namespace mesa::kernels::cuda
