// The differentiable functions. Each is one file in src/ops: forward, what is kept, backward.
#pragma once
#include <array>

#include "mesa/autograd/tape.h"
#include "mesa/kernels/attention.h"
#include "mesa/kernels/conv.h"

namespace mesa {

// ---- arithmetic ----
/// a + b of one shape; the result has a's dtype (f32 residual + bf16 branch).
Var add(const Var& a, const Var& b);
inline Var operator+(const Var& a, const Var& b) { return add(a, b); }
/// Elementwise product of one shape.
Var mul(const Var& a, const Var& b);
/// s x.
Var scale(const Var& x, double s);
/// x[.., n] + b[n], where b's extents are the last ones of x: a bias [C], or a position embedding [1, N, C].
Var bias(const Var& x, const Var& b);

// ---- products ----
/// y [.., O] = x [.., I] w^T + b with w [O, I], b [O] or undefined. Keeps x only if w is being trained. y has `out` dtype, default x's.
/// With a `residual` of y's shape: residual + x w^T + b in the residual's dtype, added by the product itself.
Var linear(const Var& x, const Var& w, const Var& b = {}, std::optional<DType> out = {}, const Var& residual = {});
/// y = gamma (x w^T + b) (+ residual) with gamma [O] (LayerScale: Touvron et al. 2021, "Going deeper with image transformers"). gamma is
/// multiplied into w and b, and its gradient comes from theirs: keeps what `linear` keeps, and nothing for gamma.
Var scaled_linear(const Var& x, const Var& w, const Var& b, const Var& gamma, std::optional<DType> out = {}, const Var& residual = {});
/// c [.., M, N] = a [.., M, K] b [.., K, N]; with transpose_b, b is [.., N, K].
Var matmul(const Var& a, const Var& b, bool transpose_b = false);

// ---- attention ----
/// x [B, N, 3C] -> q, k, v, each [B, H, N, C/H]: views, no copy.
std::array<Var, 3> split_heads(const Var& qkv, int64_t heads);
/// [B, H, N, D] -> [B, N, H D].
Var merge_heads(const Var& x);
/// softmax(scale q k^T) v for all heads at once: qkv [B, N, 3C] -> [B, N, C] (Vaswani et al. 2017). Keeps q, k, v and, while
/// these are exact, o and the rows' log-sum-exp; never N x N. From lossy storage rows are normalized again and nothing else is needed.
Var attention(const Var& qkv, int64_t heads, double scale, kernels::AttentionBy by = kernels::AttentionBy::engine);

/// The same with keys and values of other tokens: q [B, N, C], kv [B, M, 2C] -> [B, N, C].
Var attention(const Var& q, const Var& kv, int64_t heads, double scale);
/// The same as the first within windows of the grid that the tokens form, with a bias by relative position: table [distances, H]
/// (Liu et al., ICCV 2021, section 3.2). Where a fused kernel runs (a GPU, bf16, heads of 32 channels) no window is laid out, elsewhere a
/// few at a time; biases and masks for each window nowhere.
Var window_attention(const Var& qkv, const Var& table, int64_t heads, double scale, const kernels::Windows& windows);
/// Op by op: tokens [B, N, C] -> windows [B W, n, C] and back, and scores [B W, H, n, n] + bias, or what leaves no probability where places
/// do not see each other.
Var to_windows(const Var& x, const kernels::Windows& windows);
Var from_windows(const Var& x, const kernels::Windows& windows);
Var window_bias(const Var& scores, const Var& table, const kernels::Windows& windows);

// ---- normalization and activation ----
/// Over the last axis; y in `out` dtype, default x's. Keeps xhat and 1/std; y can be rebuilt as gamma xhat + beta.
Var layer_norm(const Var& x, const Var& gamma, const Var& beta, double eps, std::optional<DType> out = {});
/// Over the last axis. Keeps y.
Var softmax(const Var& x);
/// x Phi(x), exact erf form. Keeps x; y can be rebuilt.
Var gelu(const Var& x);
/// max(x, 0). Keeps one bit for each element; y can be rebuilt where x can.
Var relu(const Var& x);
/// The statistics of the batches that a batch norm has seen, [C] each, in gamma's dtype; PyTorch's momentum.
struct RunningStatistics {
  Tensor mean, var;
  double momentum = 0.1;
};
/// Of each channel of x [.., C] over all rows (Ioffe and Szegedy, ICML 2015). While gamma or beta learn on a tape, by the statistics of
/// these rows, which also move the running ones; otherwise (evaluation, or a frozen layer) by the running ones, which stay. Keeps xhat and
/// 1/std, from which y can be rebuilt as gamma xhat + beta; frozen only 1/std.
Var batch_norm(const Var& x, const Var& gamma, const Var& beta, const RunningStatistics& running, double eps);
/// Zeroes elements with probability p and scales the others by 1/(1-p). Identity without a tape.
Var dropout(const Var& x, double p);
/// x + branch, of which whole samples (axis 0) are dropped with probability p and the others scaled by 1/(1-p): stochastic depth (Huang et
/// al., ECCV 2016). The result has x's dtype. The plain sum without a tape. Keeps a factor for each sample. What is
/// not finite in a dropped sample stays so in the sum (as timm has it).
Var add_drop_path(const Var& x, const Var& branch, double p);

// ---- tokens ----
/// images [B, ch, H, W], w [C, ch, p, p], b [C] -> [B, (H/p)(W/p), C] in `out` dtype; products run in `compute` dtype.
Var patch_embed(const Var& images, const Var& w, const Var& b, DType compute, DType out);
/// A convolution of tokens whose stride is its kernel, which divides the grid: x [B, height width, C], w [O, C, p, p], b [O] ->
/// [B, (height/p)(width/p), O] in `out` dtype. Products run in `compute` dtype, in which x is kept if w is being trained.
Var patch_conv(const Var& x, int64_t height, int64_t width, const Var& w, const Var& b, DType compute, DType out);
/// Convolution of a grid x [B, height width, I] or of images [B, I, height, width]: w [O, I / groups, kh, kw], b [O] or undefined ->
/// [B, H' W', O] in `compute` dtype, in which products run and in which a grid is kept if w is being trained.
Var conv2d(const Var& x, const Var& w, const Var& b, const kernels::ConvGeometry& geometry, DType compute);
/// The largest of each window and channel: [B, height width, C] -> [B, H' W', C]. Keeps one byte for each result, which token it was.
Var max_pool2d(const Var& x, const kernels::ConvGeometry& geometry);
/// Each of `tokens`, [1, T_i, C], one after the other in front of x [B, N, C].
Var prepend_tokens(const std::vector<Var>& tokens, const Var& x);
/// Neighbours of a grid side by side: x [B, H W, C] -> [B, (H/2)(W/2), 4 C], the four of a square column by column (Swin's patch merging).
Var merge_patches(const Var& x, int64_t height, int64_t width);
/// A grid [B, height width, C] with zeros after each row and at its end: [B, to_height to_width, C]; and without.
Var pad_grid(const Var& x, int64_t height, int64_t width, int64_t to_height, int64_t to_width);
Var crop_grid(const Var& x, int64_t height, int64_t width, int64_t to_height, int64_t to_width);
/// x [B, N, C] -> [B, n, C], the first tokens.
Var first_tokens(const Var& x, int64_t n);
/// x [B, N, C] -> [B, C], the token at `index`.
Var select_token(const Var& x, int64_t index);
/// x [B, N, C] -> [B, C], the mean over tokens from..N-1.
Var mean_pool(const Var& x, int64_t from);

// ---- loss ----
/// Throws Error for a label (host memory) outside 0..classes-1, naming the sample.
void check_labels(const Tensor& labels, int64_t classes);
/// Mean over the batch: logits [B, K], labels [B] i64, smoothing in [0, 1). Labels in host memory are checked; check those for a GPU before
/// they are moved there.
Var cross_entropy(const Var& logits, const Tensor& labels, double smoothing = 0);
/// Soft targets [B, K], each row a distribution, in the logits' dtype.
Var cross_entropy(const Var& logits, const Var& targets);
/// Each class a yes or no of its own (sigmoid), targets [B, K] in [0, 1]: the mean over batch and classes, PyTorch's BCEWithLogitsLoss.
Var binary_cross_entropy(const Var& logits, const Var& targets);

}  // namespace mesa
