// The gradient of relative position biases: that of the biased scores, dS = P (dP - delta), summed over windows.
#include "attention_gradient.cuh"
#include "mesa/kernels/elementwise.h"

namespace mesa::kernels::cuda {
namespace {

/// The gradient of the biases of 16 queries and a chunk of keys, summed over the windows of a part in their order: sums [parts, heads, n,
/// n]. One warp each; blockIdx.x runs over row tiles and chunks within heads within parts.
template <int head>
__global__ void __launch_bounds__(kWarp) bias_kernel(Problem<InWindows> p, int sequences, int parts, float* sums) {
  const Extent& e = p.extent;
  const int tiles = e.tiles(), chunks = e.chunks();
  const int tile = blockIdx.x % tiles, c = blockIdx.x / tiles % chunks, h = blockIdx.x / (tiles * chunks) % e.heads;
  const int part = blockIdx.x / (tiles * chunks * e.heads);
  const int query = tile * kTile, key = c * kChunk, rows = e.rows(c);
  bf16* const q = dynamic_shared<bf16>() + p.seen.shared_elements(e);
  bf16* const d_o = q + kTile * kPitch<head>;
  bf16* const k = d_o + kTile * kPitch<head>;
  float sum[kChunk / 8][4] = {};
  const int end = static_cast<int>(int64_t{part + 1} * sequences / parts);
  for (int sequence = static_cast<int>(int64_t{part} * sequences / parts); sequence < end; ++sequence) {
    const Share share{sequence, sequence * e.heads + h, h * head, 0, 0, 0, tiles, {0, chunks}};
    __syncthreads();  // the previous window may still be read
    const auto place = p.seen.open(e, share);
    load_operand<head>(q, p.q, place.from(query), share.column, e.own - query, kTile);
    load_values<head>(d_o, p.d_o, place.from(query), share.column, e.own - query, kTile);
    load_operand<head>(k, p.k, place.from(key), share.column, rows, whole_tiles(rows));
    load_operand<head>(k + kSecond<head>, p.v, place.from(key), share.column, rows, whole_tiles(rows));
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    Queries<head> x = {};
    load_left<head>(x.q, q);
    load_left<head>(x.d_o, d_o);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = share.line * e.own + min(query + static_cast<int>(threadIdx.x) / 4 + 8 * half, e.own - 1);
      x.lse[half] = kLog2E * p.lse[at];
      x.delta[half] = p.delta[at];
    }
#pragma unroll
    for (int g = 0; g < kChunk / kTile; ++g) {
      if (g * kTile >= rows) break;
      float s[2][4] = {}, dp[2][4] = {};
      multiply_transposed<head>(s, x.q, k + g * kTile * kPitch<head>);
      multiply_transposed<head>(dp, x.d_o, k + kSecond<head> + g * kTile * kPitch<head>);
      p.seen.template add<false>(s, p.scale, e, query, key + g * kTile);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[2 * g + j][i] += exp2_approx(s[j][i] - x.lse[i / 2]) * (dp[j][i] - x.delta[i / 2]);
      }
    }
  }
  float* const to = sums + (static_cast<int64_t>(part) * e.heads + h) * e.own * e.own;
#pragma unroll
  for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = query + static_cast<int>(threadIdx.x) / 4 + i / 2 * 8,
                column = key + 8 * j + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
      if (row < e.own && column < e.own) to[row * e.own + column] = sum[j][i];
    }
  }
}

/// The rows' statistics must be there.
template <int head>
void start_bias(const Sizes& n, Problem<InWindows> p, const WindowBias& windows) {
  const int64_t length = n.sequence.queries;
  p.extent = by_queries(n, kWarps, 2).extent;
  const int64_t across = p.extent.tiles() * p.extent.chunks() * n.heads, pairs = n.heads * length * length;
  const int64_t parts = std::clamp<int64_t>(kWarpsToFill / across, 1, n.sequences);
  const Tensor sums = Tensor::empty({parts, pairs}, DType::f32, windows.d_table.device());
  const Tensor sum = Tensor::empty({n.heads, length, length}, DType::f32, windows.d_table.device());
  const int elements = p.seen.shared_elements(p.extent) + 2 * kTile * kPitch<head> + kSlot<head>;
  launch("fused_attention_grad (biases)", &bias_kernel<head>, dim3(static_cast<unsigned>(across * parts)), dim3(kWarp),
         elements * sizeof(bf16), p, static_cast<int>(n.sequences), static_cast<int>(parts), sums.data<float>());
  sum_rows(sums, sum.reshape({pairs}), false);
  expand_bias_grad(sum, windows.windows, 1, windows.d_table, windows.accumulate);
}

}  // namespace

void window_bias_grad(const Tensor& d_o, const AttentionOperand& q, const AttentionOperand& k, const AttentionOperand& v, const Tensor& lse,
                      const Tensor& delta, int64_t heads, double scale, const WindowBias& windows) {
  const Sizes n = sizes_of(d_o, d_o, heads, scale, windows);
  const InWindows seen{windows.windows, windows.table.data<float>()};
  start_bias<32>(n, problem_of(n, seen, q, k, v, d_o, lse, delta, scale), windows);
}

}  // namespace mesa::kernels::cuda
