// Softmax attention by cuDNN, as graphs from which it compiles flash attention for each shape once:
//   s = scale q k^T,  lse = log sum exp s,  o = exp(s - lse) v,
//   p = exp(s - lse),  dv = p^T dO,  ds = scale p (dO v^T - delta),  delta = sum_d dO o,  dq = ds k,  dk = ds^T q.
#include <compare>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cudnn_graph.h"
#include "mesa/base/cuda.h"
#include "mesa/base/cuda_profile.h"
#include "mesa/kernels/attention.h"

namespace mesa::kernels::cuda {
namespace {

using cudnn::Graph;
using cudnn::Memory;
using cudnn::Plan;
using cudnn::Value;

constexpr cudnnDataType_t kBf16 = CUDNN_DATA_BFLOAT16, kF32 = CUDNN_DATA_FLOAT;

/// What a plan is made for: extents, and the distances of rows in the tensors [B, N, C], by which one plan differs from another.
struct Case {
  int64_t B, H, N, D;
  int64_t q, k, v, o;                       // row strides, in elements
  int64_t d_o = 0, dq = 0, dk = 0, dv = 0;  // of the backward
  bool backward = false;
  auto operator<=>(const Case&) const = default;
};

// --- graphs ----------------------------------------------------------------------------------------------------------------------

enum Uid : int64_t { kQ = 1, kK, kV, kO, kLse, kScale, kDO, kDelta, kOne, kDQ, kDK, kDV };

/// [B, H, N, D] of a tensor [B, N, H D] in memory.
Value heads_of(Graph& g, Uid uid, const Case& c, int64_t row_stride) {
  return g.tensor(uid, kBf16, {c.B, c.H, c.N, c.D}, {c.N * row_stride, c.D, row_stride, 1});
}
/// The same as [B, H, D, N]: cuDNN wants the second operand of a product as the product has it.
Value transposed_heads_of(Graph& g, Uid uid, const Case& c, int64_t row_stride) {
  return g.tensor(uid, kBf16, {c.B, c.H, c.D, c.N}, {c.N * row_stride, c.D, 1, row_stride});
}
/// One number for each row of scores: [B, H, N, 1].
Value rows(Graph& g, Uid uid, const Case& c) { return g.tensor(uid, kF32, {c.B, c.H, c.N, 1}, {c.H * c.N, c.N, 1, 1}); }

Graph forward(const Case& c) {
  Graph g;
  const Value q = heads_of(g, kQ, c, c.q), k_t = transposed_heads_of(g, kK, c, c.k), v = heads_of(g, kV, c, c.v);
  const Value o = heads_of(g, kO, c, c.o);
  const Value lse = rows(g, kLse, c), scale = g.scalar(kScale);
  const Value s = g.mul(g.matmul(q, k_t), scale);
  const Value top = g.max(s);
  const Value e = g.exp(g.sub(s, top));
  const Value total = g.sum(e);
  g.add(top, g.log(total), lse);
  g.matmul(g.div(e, total, kBf16), v, o);
  return g;
}

/// cuDNN knows this graph by its form, the product of delta with one included: without it the workspace doubles. That dq is the direct
/// result of its product makes it deterministic: ds waits in the workspace (2 B H N^2 bytes, N rounded up to 64 and 128) for a second
/// kernel. The other form that cuDNN knows, with an f32 sum for dq in memory, adds to it with atomics.
Graph backward(const Case& c) {
  Graph g;
  const Value q = heads_of(g, kQ, c, c.q), k_t = transposed_heads_of(g, kK, c, c.k), v_t = transposed_heads_of(g, kV, c, c.v);
  const Value o = heads_of(g, kO, c, c.o), d_o = heads_of(g, kDO, c, c.d_o);
  const Value dq = heads_of(g, kDQ, c, c.dq), dk = heads_of(g, kDK, c, c.dk), dv = heads_of(g, kDV, c, c.dv);
  const Value lse = rows(g, kLse, c), scale = g.scalar(kScale);
  const Value delta = g.mul(g.sum(g.mul(d_o, o)), g.scalar(kOne), rows(g, kDelta, c));
  const Value p = g.exp(g.sub(g.mul(g.matmul(q, k_t), scale), lse));
  g.matmul(g.transpose(p, kBf16), d_o, dv);
  const Value ds = g.mul(g.mul(g.sub(g.matmul(d_o, v_t), delta), p), scale);
  g.matmul(g.transpose(ds, kBf16), q, dk);
  g.matmul(ds, g.transpose(k_t, kF32), dq);
  return g;
}

Graph graph_of(const Case& c) { return c.backward ? backward(c) : forward(c); }

/// Why cuDNN is not asked at all, or "".
std::string refusal(const Case& c) {
  if (cudnnGetVersion() == 0)
    return concat("it is not installed where programs find it: ", cudnnGetErrorString(CUDNN_STATUS_NOT_SUPPORTED));
  if (cudnnGetVersion() < 91600)
    return "9.16 or newer is needed: the backward of older ones is wrong unless tokens come in multiples of 128";
  if (c.D % 8 != 0) return concat("a head of ", c.D, " channels is no multiple of 8");
  for (const int64_t stride : {c.q, c.k, c.v, c.o, c.d_o, c.dq, c.dk, c.dv})
    if (stride % 8 != 0) return concat("rows at a distance of ", stride, " elements do not all begin at multiples of 16 bytes");
  if (c.backward && c.N < 2) return "it has no backward for a single token";
  return "";
}

// --- running ---------------------------------------------------------------------------------------------------------------------

const Plan& plan_of(const Case& c, cudnnHandle_t on) {
  static std::map<Case, Plan>& plans = *new std::map<Case, Plan>;
  auto found = plans.find(c);
  if (found == plans.end()) found = plans.emplace(c, Plan(graph_of(c), on)).first;
  return found->second;
}

void run(const Case& c, Device device, Memory memory, double scale) {
  for (const auto& [uid, address] : memory)
    check(reinterpret_cast<uintptr_t>(address) % 16 == 0, "attention by cuDNN needs tensors that begin at multiples of 16 bytes");
  float scale_value = static_cast<float>(scale), one = 1;  // read while the kernels are started
  memory.emplace_back(kScale, &scale_value);
  if (c.backward) memory.emplace_back(kOne, &one);
  cudnn::Library& library = cudnn::Library::get();
  std::lock_guard lock(library.mutex);
  try {
    if (const std::string reason = refusal(c); !reason.empty()) throw cudnn::Unsupported(reason);
    const cudnnHandle_t handle = library.handle_on(mesa::cuda::stream());
    const Plan& plan = plan_of(c, handle);
    const Tensor workspace = Tensor::empty({plan.workspace_bytes()}, DType::u8, device);
    const mesa::cuda::Timed timed(c.backward ? "attention by cuDNN, backward" : "attention by cuDNN");
    plan.run(handle, memory, workspace.raw());
  } catch (const cudnn::Unsupported& reason) {
    fail("cuDNN ", cudnn::version(), " has no ", c.backward ? "backward" : "forward", " attention for ", c.H, " heads of ", c.D,
         " channels and ", c.N, " tokens on this GPU; use model.attention: fused (", reason.what(), ")");
  }
  if (mesa::cuda::synchronous()) mesa::cuda::synchronize("attention by cuDNN");
}

/// The rows' distance of a tensor [B, N, C] that cuDNN can read.
int64_t checked_rows(const Tensor& x, const Tensor& like, const char* name) {
  check(x.dtype() == DType::bf16, "attention by cuDNN takes bf16, and ", name, " is ", to_string(x.dtype()),
        "; use model.attention: fused");
  check(x.shape() == like.shape(), name, " of shape ", x.shape(), " where q has ", like.shape());
  check(x.has_uniform_rows(), name, " of shape ", x.shape(), " must consist of uniform rows");
  return x.row_stride();
}

Case checked_case(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& lse, int64_t heads) {
  check(q.rank() == 3 && heads > 0 && q.dim(2) % heads == 0, "attention with ", heads, " heads needs [B, N, C] with C a multiple of ",
        heads, ", not ", q.shape());
  const int64_t B = q.dim(0), N = q.dim(1), D = q.dim(2) / heads;
  check(lse.dtype() == DType::f32 && lse.is_contiguous() && lse.shape() == Shape({B, heads, N}), "lse must be f32 [B, H, N], not ",
        to_string(lse.dtype()), " ", lse.shape());
  return {B, heads, N, D, checked_rows(q, q, "q"), checked_rows(k, q, "k"), checked_rows(v, q, "v"), checked_rows(o, q, "o")};
}

}  // namespace

void cudnn_attention(const Tensor& q, const Tensor& k, const Tensor& v, int64_t heads, double scale, const Tensor& o, const Tensor& lse) {
  const Case c = checked_case(q, k, v, o, lse, heads);
  if (q.numel() == 0) return;
  run(c, q.device(), {{kQ, q.raw()}, {kK, k.raw()}, {kV, v.raw()}, {kO, o.raw()}, {kLse, lse.raw()}}, scale);
}

void cudnn_attention_grad(const Tensor& d_o, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& lse,
                          int64_t heads, double scale, const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  Case c = checked_case(q, k, v, o, lse, heads);
  c.d_o = checked_rows(d_o, q, "the gradient of o");
  c.dq = checked_rows(dq, q, "the gradient of q");
  c.dk = checked_rows(dk, q, "the gradient of k");
  c.dv = checked_rows(dv, q, "the gradient of v");
  c.backward = true;
  if (q.numel() == 0) return;
  const Tensor delta = Tensor::empty({c.B, c.H, c.N}, DType::f32, q.device());
  Memory memory{{kQ, q.raw()}, {kK, k.raw()}, {kV, v.raw()}, {kO, o.raw()}, {kLse, lse.raw()}};
  memory.insert(memory.end(), {{kDO, d_o.raw()}, {kDelta, delta.raw()}, {kDQ, dq.raw()}, {kDK, dk.raw()}, {kDV, dv.raw()}});
  run(c, q.device(), memory, scale);
}

std::string cudnn_attention_support(const std::string& device_properties, int64_t B, int64_t H, int64_t N, int64_t D, bool backward) {
  const int64_t C = H * D;
  Case c{B, H, N, D, 3 * C, 3 * C, 3 * C, C};  // q, k and v as thirds of the packed projection
  if (backward) c.d_o = C, c.dq = c.dk = c.dv = 3 * C, c.backward = true;
  if (const std::string reason = refusal(c); !reason.empty()) return reason;
  try {
    Plan::check_support(graph_of(c), device_properties);
    return "";
  } catch (const cudnn::Unsupported& reason) {
    return reason.what();
  }
}

}  // namespace mesa::kernels::cuda
