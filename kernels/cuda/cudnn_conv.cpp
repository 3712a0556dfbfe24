// Convolutions by cuDNN: y = x * w, dx = dy * w^T, dw = x * dy, each a graph of one operation in nhwc, planned for each shape once.
// All tensors have one dtype, dw included: of bf16 operands cuDNN 9.19 has no engine with an f32 dw. Sums run in f32.
#include <map>
#include <optional>

#include "cudnn_graph.h"
#include "mesa/base/cuda.h"
#include "mesa/kernels/conv.h"

namespace mesa::kernels::cuda {

// As src/kernels/conv.cpp declares them.
bool cudnn_conv(const Tensor& x, const Tensor& w, const Tensor& y, const ConvGeometry& geometry);
bool cudnn_conv_data_grad(const Tensor& dy, const Tensor& w, const Tensor& dx, const ConvGeometry& geometry);
bool cudnn_conv_weight_grad(const Tensor& dy, const Tensor& x, const Tensor& dw, const ConvGeometry& geometry);

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

/// Results that repeat bit for bit, and of f32 operands f32 products, as elsewhere.
cudnn::Engines engines() {
  return {
      {CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC, CUDNN_NUMERICAL_NOTE_DOWN_CONVERT_INPUTS, CUDNN_NUMERICAL_NOTE_REDUCED_PRECISION_REDUCTION},
      true};
}

/// Null where there is no engine.
const Plan* plan_of(const Case& c, cudnnHandle_t on) {
  static std::map<Case, std::optional<Plan>>& plans = *new std::map<Case, std::optional<Plan>>;
  auto found = plans.find(c);
  if (found == plans.end()) {
    found = plans.try_emplace(c).first;
    try {
      found->second.emplace(graph_of(c), on, engines());
    } catch (const cudnn::Unsupported&) {
      found->second.reset();
    }
  }
  return found->second ? &*found->second : nullptr;
}

bool run(Pass pass, const Tensor& x, const Tensor& w, const Tensor& y, const ConvGeometry& g) {
  for (const Tensor* t : {&x, &w, &y})
    if (reinterpret_cast<uintptr_t>(t->raw()) % 16 != 0) return false;
  if (cudnnGetVersion() == 0) return false;  // not installed here
  cudnn::Library& library = cudnn::Library::get();
  const std::lock_guard lock(library.mutex);
  const cudnnHandle_t handle = library.handle_on(mesa::cuda::stream());
  const Plan* plan = plan_of({pass, x.dim(0), x.dim(2), y.dim(2), g, x.dtype()}, handle);
  if (plan == nullptr) return false;
  const Tensor workspace = Tensor::empty({plan->workspace_bytes()}, DType::u8, x.device());
  try {
    plan->run(handle, {{kX, x.raw()}, {kW, w.raw()}, {kY, y.raw()}}, workspace.raw());
  } catch (const cudnn::Unsupported& reason) {
    fail("cuDNN ", cudnn::version(), " refuses to run a convolution that it had planned: ", reason.what());
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

std::string cudnn_conv_support(const std::string& device_properties, const ConvGeometry& g, int64_t B, int64_t I, int64_t O, DType dtype) {
  for (const auto& [pass, name] :
       {std::pair{Pass::forward, "forward"}, {Pass::data, "data gradient"}, {Pass::weights, "weight gradient"}}) {
    try {
      Plan::check_support(graph_of({pass, B, I, O, g, dtype}), device_properties, engines());
    } catch (const cudnn::Unsupported& reason) {
      return concat(name, ": ", reason.what());
    }
  }
  return "";
}

}  // namespace mesa::kernels::cuda
