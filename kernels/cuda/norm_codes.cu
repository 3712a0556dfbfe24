// Layer norm that keeps codes of xhat in place of xhat, in one pass: see norm.cu for the formula.
#include "codec_groups.cuh"
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

/// By running estimates. Two blocks a multiprocessor also for rows that fill no team, whose checks take registers.
template <class Team, class X, class Y>
__global__ void __launch_bounds__(kRowWarps* kWarp, 2) norm_running_codes_kernel(NormRow<X, Y> norm, int64_t rows, Producer to, int lanes) {
  CodedRows<Team, Y> coded(to, norm.width);
  to.watch.begin();
  for (int64_t row = Team::row(); row < rows; row += int64_t{gridDim.x} * kRowWarps) norm(Team{}, row, coded);
  coded.finish(lanes);
}

/// Units in shared memory, all whole.
template <class T>
struct Tile {
  const T* data;
  uint32_t count, whole;
  __device__ const T* at(uint32_t u) const { return data + u * kUnit; }
  __device__ Unit<T> load(uint32_t u) const { return Units<T>::load(at(u)); }
  __device__ Unit<T> load_rest() const { return {}; }
  __device__ int valid(uint32_t) const { return kUnit; }
};

inline constexpr int kTileUnits = 2;  ///< that a thread holds of a group, which a warp can hold

/// By the own ranges of groups, whole ones of which fill a block's rows: the rows meet in shared memory, since groups may reach over them.
template <class Team, class X, class Y>
__global__ void norm_current_codes_kernel(NormRow<X, Y> norm, int64_t rows, GroupTeams teams, Producer to) {
  Y* const values = dynamic_shared<Y>();
  const int width = static_cast<int>(norm.width), own = threadIdx.x / kWarp;
  const int64_t first = int64_t{blockIdx.x} * kRowWarps;
  if (first + own < rows) norm(Team{}, first + own, [&](int64_t, int, auto c, const auto& h) { store_pack(values + own * width + c, h); });
  __syncthreads();

  const uint32_t count = static_cast<uint32_t>(min(rows - first, int64_t{kRowWarps})) * width / kUnit;
  const Tile<Y> tile{values, count, count};
  const uint32_t block_unit = static_cast<uint32_t>(first * width / kUnit), block_group = block_unit / teams.units;
  for (uint32_t done = 0; done * teams.units < count; done += blockDim.x >> teams.log_lanes) {
    const uint32_t group = done + (threadIdx.x >> teams.log_lanes);
    const HeldGroup<Y, kTileUnits> held(tile, teams, group * teams.units);
    const GroupScale scale = held.measure(tile, teams, block_group + group, to.bits);
#pragma unroll
    for (int k = 0; k < kTileUnits; ++k) {
      if (held.at(k) >= held.end) break;
      float v[kUnit];
      held.unit[k].values(v);
      to.write(block_unit + held.at(k), v, scale);
    }
  }
}

/// So many neighbouring lanes, a power of two, have pieces of V elements of the same group.
int lanes_of_group(const GroupLayout& layout, int V) {
  int lanes = kWarp;
  if (layout.groups > 1)
    while (layout.inner % (lanes * V) != 0) lanes /= 2;
  return lanes;
}

/// True if it could be done.
template <class Team, class X, class Y>
bool running_codes(const NormRow<X, Y>& norm, int64_t rows, const Coding& into) {
  const int64_t n = rows * norm.width;
  if (!can_produce(into, n, norm.width, Team::kVector)) return false;
  const WatchedGroups groups(into);
  launch("layer_norm_codes", &norm_running_codes_kernel<Team, X, Y>, grid_for(rows, kRowWarps, 132 * 8), kRowWarps * kWarp,
         groups.watch.shared_bytes(), norm, rows, producer_of(into, n, groups), lanes_of_group(into.layout, Team::kVector));
  return true;
}
template <class Team, class X, class Y>
bool current_codes(const NormRow<X, Y>& norm, int64_t rows, const Coding& into) {
  const int64_t n = rows * norm.width, tile = kRowWarps * norm.width, inner = into.layout.inner;
  const bool fits = are_short_groups(into.layout, n) && inner <= kWarp * kTileUnits * kUnit && tile % inner == 0;
  if (!fits || norm.width % kUnit != 0 || !can_write(into, n, kUnit)) return false;
  launch("layer_norm_codes", &norm_current_codes_kernel<Team, X, Y>, static_cast<unsigned>(ceil_div(rows, kRowWarps)), kRowWarps * kWarp,
         static_cast<size_t>(tile) * sizeof(Y), norm, rows, group_teams(into, kTileUnits), producer_of(into, n));
  return true;
}

template <class X, class Y>
bool in_one_pass(const NormRow<X, Y>& norm, int64_t rows, const Coding& into) {
  constexpr int kWidest = kVectorOf<X, Y>;
  if (!norm.in_vectors()) return false;
  bool done = false;
  with_team<kWidest, true>(norm.width, [&](auto team) {
    using Team = decltype(team);
    if constexpr (Team::kKeeps && Team::kVector > 1)
      done = into.is_running() ? running_codes<Team>(norm, rows, into) : current_codes<Team>(norm, rows, into);
  });
  return done;
}

}  // namespace

void layer_norm_codes(const Tensor& x, const Tensor& gamma, const Tensor& beta, double eps, const Tensor& y, const Tensor& rstd,
                      const Coding& xhat) {
  check_layout(y, xhat.layout);
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
  encode(values, xhat);
}

}  // namespace mesa::kernels::cuda
