// Convolutions by cuDNN: y = x * w, dx = dy * w^T, dw = x * dy, each a graph of one operation in nhwc, planned for each shape once.
// All tensors have one dtype, dw included: of bf16 operands cuDNN 9.19 has no engine with an f32 dw. Sums run in f32.
#include <algorithm>
#include <map>
#include <optional>

#include "cudnn_graph.h"
#include "mesa/base/cuda.h"
#include "mesa/base/cuda_profile.h"
#include "mesa/kernels/conv.h"
#include "mesa/kernels/elementwise.h"

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
constexpr int64_t kAlignment = 16;  // bytes, of all operands

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

/// What there is for a case: a plan or the reason why there is none; and what faster engines would want too much of.
struct Choice {
  std::optional<Plan> plan;
  std::string refusal;
  int64_t wanted = 0;    ///< bytes of workspace; 0: there is no faster one
  bool settled = false;  ///< false: slower engines are still to be asked
};
/// `slower`: an engine that cuDNN takes for slower than those that want too much will do.
Choice& choice_for(const Case& c, cudnnHandle_t on, bool slower) {
  static std::map<Case, Choice>& choices = *new std::map<Case, Choice>;
  const auto [found, fresh] = choices.try_emplace(c);
  Choice& choice = found->second;
  if (!fresh && (choice.settled || !slower)) return choice;
  cudnn::Engines may = engines(c.dtype);
  may.slower = slower;
  try {
    choice.wanted = choice.plan.emplace(graph_of(c), on, may).faster_wants();
  } catch (const cudnn::Unsupported& reason) {
    choice.refusal = reason.what(), choice.wanted = reason.wanted;
  } catch (...) {
    choices.erase(found);
    throw;
  }
  choice.settled = slower || choice.wanted == 0;
  return choice;
}

/// How many images of a batch a convolution takes at a time: all, unless the workspace of fewer, of not too few, lets a faster engine run.
int64_t images_at_once(const Case& all, cudnnHandle_t on) {
  constexpr int64_t kMostParts = 16;
  const int64_t x = all.I * all.g.height * all.g.width, y = all.O * all.g.out_height() * all.g.out_width(), size = size_of(all.dtype);
  for (Case c = all;;) {
    const Choice& choice = choice_for(c, on, false);
    if (choice.wanted == 0) return choice.plan ? c.B : all.B;
    if (c.B == 1) return all.B;
    const int64_t half = (c.B + 1) / 2;
    c.B = half > 8 ? (half + 7) / 8 * 8 : half;  // whole blocks of 16 bytes, if images of odd sizes are bf16
    const bool aligned = c.B * x * size % kAlignment == 0 && c.B * y * size % kAlignment == 0;
    if (c.B * kMostParts < all.B || !aligned) return all.B;
  }
}

/// Of some images.
bool run(const Case& c, cudnnHandle_t handle, const cudnn::Memory& memory, Device device) {
  Choice& choice = choice_for(c, handle, true);
  if (!choice.plan) return note_slow(c, choice.refusal), false;
  Plan& plan = *choice.plan;
  if (choice.wanted > 0) note_slow(c, concat("faster engines want a workspace of ", choice.wanted, " bytes"));
  Tensor workspace;
  try {
    workspace = Tensor::empty({plan.workspace_bytes()}, DType::u8, device);
  } catch (const OutOfMemory&) {  // no plan of a run has it
    return note_slow(c, concat("no memory for a workspace of ", plan.workspace_bytes(), " bytes")), false;
  }
  const mesa::cuda::Timed timed(mesa::cuda::profiling() ? "convolution by cuDNN: " + to_string(c) : "");
  try {
    plan.run(handle, memory, workspace.raw());
  } catch (const cudnn::Unsupported& reason) {  // of what it had planned
    choice.refusal = reason.what(), choice.wanted = 0;
    choice.plan.reset();
    return note_slow(c, choice.refusal), false;
  }
  if (mesa::cuda::synchronous()) mesa::cuda::synchronize("a convolution by cuDNN");
  return true;
}

/// The library's handle; null where it cannot be used, which is told.
cudnnHandle_t start() {
  if (cudnnGetVersion() == 0) return note_slow("all, since cuDNN was not found"), nullptr;
  static bool starts = true;  // unless a part of cuDNN is missing, say
  if (!starts) return nullptr;
  try {
    return cudnn::Library::get().handle_on(mesa::cuda::stream());
  } catch (const OutOfMemory&) {
    throw;
  } catch (const Error& reason) {
    note_slow(concat("all: ", reason.what()));
    starts = false;
    return nullptr;
  }
}

/// So many images at a time; dw is the sum of the parts', in f32.
bool run_parts(const Case& all, int64_t at_once, cudnnHandle_t handle, const Tensor& x, const Tensor& w, const Tensor& y) {
  const bool adds = all.pass == Pass::weights && at_once < all.B;
  const Tensor sum = adds ? empty_like(w, DType::f32) : Tensor();
  Case c = all;
  for (int64_t begin = 0; begin < all.B; begin += at_once) {
    c.B = std::min(at_once, all.B - begin);
    const Tensor part_x = x.narrow(0, begin, c.B), part_y = y.narrow(0, begin, c.B);
    if (!run(c, handle, {{kX, part_x.raw()}, {kW, w.raw()}, {kY, part_y.raw()}}, x.device())) return false;
    if (adds && begin == 0) kernels::copy(w, sum);
    if (adds && begin > 0) kernels::add(sum, w, sum);
  }
  if (adds) kernels::copy(sum, w);
  return true;
}

bool run(Pass pass, const Tensor& x, const Tensor& w, const Tensor& y, const ConvGeometry& g) {
  const Case c{pass, x.dim(0), x.dim(2), y.dim(2), g, x.dtype()};
  const std::lock_guard lock(cudnn::Library::get().mutex);
  const cudnnHandle_t handle = start();
  if (handle == nullptr) return false;
  for (const Tensor* t : {&x, &w, &y})
    if (reinterpret_cast<uintptr_t>(t->raw()) % kAlignment != 0)
      return note_slow(c, concat("operands that do not begin at multiples of ", kAlignment, " bytes")), false;
  for (int64_t at_once = images_at_once(c, handle);;) {
    if (run_parts(c, at_once, handle, x, w, y)) return true;
    const int64_t before = at_once;
    at_once = images_at_once(c, handle);  // another one, where a plan of parts is refused after all
    if (at_once == before) return false;
  }
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
