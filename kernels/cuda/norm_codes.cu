// Layer norm that keeps codes of xhat in place of xhat, in one pass: see norm.cu for the formula.
#include "codec_producer.cuh"
#include "mesa/kernels/norm.h"
#include "norm_row.h"

namespace mesa::kernels::cuda {
namespace {

/// A thread's pieces of a row, coded row after row: a piece lies in the same group in every row.
template <class Team, class T>
class CodedRows {
 public:
  static constexpr int V = Team::kVector, P = Team::kPieces;

  __device__ CodedRows(const Producer& to, int64_t width) : to_(to), width_(width) {
    Team::each(width, [&](int p, auto c) { scale_[p] = to_.scale_of(to_.group_at(static_cast<uint32_t>(c))); });
  }

  template <class Column>
  __device__ void operator()(int64_t row, int p, Column c, const float (&h)[V]) {
    float x[V];
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = rounded_to<T>(h[i]);  // what would be kept without codes
    noted_[p].add(x, scale_[p], saturated_, nonfinite_);
    to_.write(row * (width_ / V) + c / V, x, scale_[p]);
  }

  /// By all threads of the block. `lanes` neighbours have pieces of one group.
  __device__ void finish(int lanes) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      float lo = noted_[p].lo, hi = noted_[p].hi;
      neighbours_range(lo, hi, lanes);
      const int c = (p * kWarp + lane) * V;
      if (lane % lanes == 0 && c < width_) to_.watch.put(to_.group_at(static_cast<uint32_t>(c)), lo, hi);
    }
    to_.watch.finish(saturated_, nonfinite_);
  }

 private:
  const Producer& to_;
  int64_t width_;
  GroupScale scale_[P];
  Noted noted_[P];
  uint32_t saturated_ = 0, nonfinite_ = 0;
};

template <class Team, class X, class Y>
__global__ void norm_codes_kernel(NormRow<X, Y> norm, int64_t rows, Producer to, int lanes) {
  CodedRows<Team, Y> coded(to, norm.width);
  to.watch.begin();
  for (int64_t row = Team::row(); row < rows; row += int64_t{gridDim.x} * kRowWarps) norm(Team{}, row, coded);
  coded.finish(lanes);
}

/// So many neighbouring lanes, a power of two, have pieces of V elements of the same group.
int lanes_of_group(const GroupLayout& layout, int V) {
  int lanes = kWarp;
  if (layout.groups > 1)
    while (layout.inner % (lanes * V) != 0) lanes /= 2;
  return lanes;
}

/// True if it could be done.
template <class X, class Y>
bool in_one_pass(const NormRow<X, Y>& norm, int64_t rows, const RunningCodes& into) {
  constexpr int kWidest = kVectorOf<X, Y>;
  if (!norm.in_vectors()) return false;
  const int64_t width = norm.width, n = rows * width;
  bool done = false;
  with_team<kWidest, true>(width, [&](auto team) {
    using Team = decltype(team);
    if constexpr (Team::kKeeps && Team::kVector > 1) {
      if (!can_produce(into, n, width, Team::kVector)) return;
      const WatchedGroups groups(into);
      launch("layer_norm_codes", &norm_codes_kernel<Team, X, Y>, grid_for(rows, kRowWarps, 132 * 8), kRowWarps * kWarp,
             groups.watch.shared_bytes(), norm, rows, producer_of(into, n, groups), lanes_of_group(into.layout, Team::kVector));
      done = true;
    }
  });
  return done;
}

}  // namespace

void layer_norm_codes(const Tensor& x, const Tensor& gamma, const Tensor& beta, double eps, const Tensor& y, const Tensor& rstd,
                      const RunningCodes& xhat) {
  bool done = false;
  if (x.dtype() == DType::f32 && x.numel() > 0) {
    dispatch_narrow(y.dtype(), [&](auto ty) {
      using Y = decltype(ty);
      done = in_one_pass(NormRow<float, Y>(x, gamma, beta, eps, y, {}, rstd), x.rows(), xhat);
    });
  }
  if (done) return;
  const Tensor values = empty_like(y);
  layer_norm(x, gamma, beta, eps, y, values, rstd);
  quantize_running(values, xhat);
}

}  // namespace mesa::kernels::cuda
