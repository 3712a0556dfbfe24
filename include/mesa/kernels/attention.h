// Softmax attention for all heads at once, by rows of scores that are never kept.
#pragma once
#include <array>

#include "mesa/kernels/codec.h"
#include "mesa/kernels/windows.h"

namespace mesa::kernels {

/// One operand of the backward: values [B, N or M, C], or the codes of such a tensor, which a fused kernel decodes as it reads them.
struct AttentionOperand {
  Tensor values;
  Coded coded;  ///< where values is undefined
};

/// Where the codes of q, k and v go; those that are not defined are not written.
using QkvCodes = std::array<Coding, 3>;

/// Which kernels compute it: the best that the backend has, or cuDNN's (a GPU and bf16 only).
enum class AttentionBy { engine, cudnn };

/// o <- softmax(scale q k^T) v for each of `heads` heads; lse [B, H, N] <- log of each row's sum (f32, f64 for f64). With `windows` each
/// attends within itself: softmax(scale q k^T + bias) v, and lse is [B windows, H, n].
/// q, o [B, N, C], k, v [B, M, C], C = H D: views of uniform rows with unit last stride, such as thirds of a packed projection; M is N in
/// windows.
/// `codes` of q, k and v are written too where they are defined, as encode does.
void attention(const Tensor& q, const Tensor& k, const Tensor& v, int64_t heads, double scale, const Tensor& o, const Tensor& lse,
               AttentionBy by = AttentionBy::engine, const QkvCodes& codes = {}, const WindowBias& windows = {});

/// dq, dk, dv from the gradient d_o of o, of the shapes of q, k, v and o. With o and lse (exact storage) the probabilities are exp(scale q
/// k^T - lse) and delta = sum_d dO O; without them (undefined) rows are normalized again and delta = sum_j P dP, so that all of it comes
/// from one source. `sums` [attention_grad_parts, 3 C] f32, where it is defined, gets rows that add up to the sums of the rows of dq, dk
/// and dv, as they hold them: for the gradient of the bias behind which q, k and v lie packed.
void attention_grad(const Tensor& d_o, const AttentionOperand& q, const AttentionOperand& k, const AttentionOperand& v, const Tensor& o,
                    const Tensor& lse, int64_t heads, double scale, const Tensor& dq, const Tensor& dk, const Tensor& dv,
                    AttentionBy by = AttentionBy::engine, const WindowBias& windows = {}, const Tensor& sums = {});
/// Rows of such sums that are made in the same pass as the gradients of q, k and v like `q` [B, N, C]; 0: none are.
int64_t attention_grad_parts(const Tensor& q, int64_t heads, AttentionBy by, const Windows& windows);

// One kernel for all of it, where a backend has one: CUDA, bf16, heads of 32 or 64 channels; windows have heads of 32 and at most 1,024
// tokens. Deterministic.
MESA_KERNEL(fused_attention, const Tensor& q, const Tensor& k, const Tensor& v, int64_t heads, double scale, const Tensor& o,
            const Tensor& lse, const QkvCodes& codes, const WindowBias& windows);
MESA_KERNEL(fused_attention_grad, const Tensor& d_o, const AttentionOperand& q, const AttentionOperand& k, const AttentionOperand& v,
            const Tensor& o, const Tensor& lse, int64_t heads, double scale, const Tensor& dq, const Tensor& dk, const Tensor& dv,
            const WindowBias& windows, const Tensor& sums);

// The same by cuDNN, where the build has it: bf16, heads of a multiple of 8 channels. Deterministic. The backward needs o and lse.
MESA_KERNEL(cudnn_attention, const Tensor& q, const Tensor& k, const Tensor& v, int64_t heads, double scale, const Tensor& o,
            const Tensor& lse);
MESA_KERNEL(cudnn_attention_grad, const Tensor& d_o, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& lse,
            int64_t heads, double scale, const Tensor& dq, const Tensor& dk, const Tensor& dv);
namespace cuda {
/// "" if cuDNN would run attention of these extents (q, k and v packed) on a GPU with these properties (cuDNN's JSON); otherwise why not.
/// Needs no GPU, only a libcuda.so.1 to open (the toolkit's stub will do).
[[gnu::weak]] std::string cudnn_attention_support(const std::string& device_properties, int64_t B, int64_t H, int64_t N, int64_t D,
                                                  bool backward);
}  // namespace cuda

}  // namespace mesa::kernels
