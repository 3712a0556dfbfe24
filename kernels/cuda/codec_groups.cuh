// Short groups of consecutive elements, each held, measured and coded by a team of neighbouring threads in one visit.
#pragma once
#include "codec_watch.cuh"

namespace mesa::kernels::cuda {
namespace {

/// Units that a thread holds of a group that is read from memory. The largest group is that of a block of 512 threads.
inline constexpr int kTeamUnits = 4;
inline constexpr int64_t kLongest = 512 * kTeamUnits * kUnit;

/// The range of teams of `lanes` neighbours, a power of two; more than a warp are a whole block.
__device__ inline void team_range(float& lo, float& hi, uint32_t lanes) {
  if (lanes > kWarp) {
    lo = block_reduce(lo, Minimum{}, kEmptyLo), hi = block_reduce(hi, Maximum{}, kEmptyHi);
    return;
  }
  neighbours_range(lo, hi, static_cast<int>(lanes));
}

/// How groups are dealt to teams of 2^log_lanes threads, and where the scales go that the teams find.
struct GroupTeams {
  uint32_t units, groups;  ///< units of a group (the last may have less), groups
  int log_lanes;
  float *step, *offset;
  unsigned long long* nonfinite;  ///< or null

  /// For one group a team.
  unsigned threads() const { return (1u << log_lanes) > kWarp ? 1u << log_lanes : 256u; }
  unsigned blocks() const { return static_cast<unsigned>(ceil_div(int64_t{groups} << log_lanes, threads())); }

  __device__ uint32_t lanes() const { return 1u << log_lanes; }
  __device__ uint32_t lane() const { return threadIdx.x & (lanes() - 1); }
};

/// Groups of whole units that a block can hold.
inline bool are_short_groups(const GroupLayout& layout, int64_t n) {
  return layout.consecutive && layout.inner <= kLongest && unit_groups(layout, n) == 1;
}

/// Teams whose threads hold at most n units each.
inline GroupTeams group_teams(const GroupLayout& layout, int n, float* step, float* offset, int64_t* counts) {
  const int64_t units = layout.inner / kUnit;
  int log_lanes = 0;
  while (int64_t{n} << log_lanes < units) ++log_lanes;
  auto* const nonfinite = counts ? reinterpret_cast<unsigned long long*>(counts + 1) : nullptr;
  return {static_cast<uint32_t>(units), static_cast<uint32_t>(layout.groups), log_lanes, step, offset, nonfinite};
}
inline GroupTeams group_teams(const Coding& into, int n) {
  return group_teams(into.layout, n, per_group(into.step, into.layout), per_group(into.offset, into.layout), count_pair(into.counts));
}

/// What one thread of a team holds of its group: unit k is the unit at(k) of x, for at(k) < end. x is Units, or a Tile of them. Threads
/// whose team has no group hold nothing; all compute on whatever they hold, so that no branch parts them.
template <class T, int n>
struct HeldGroup {
  uint32_t first, end, lanes;
  Unit<T> unit[n]{};

  /// The group whose units begin at `begin`.
  template <class Source>
  __device__ HeldGroup(const Source& x, const GroupTeams& teams, uint32_t begin)
      : first(begin + teams.lane()), end(begin < x.count ? min(begin + teams.units, x.count) : begin), lanes(teams.lanes()) {
    const uint32_t whole = min(end, x.whole);
#pragma unroll
    for (int k = 0; k < n; ++k)
      if (at(k) < whole) unit[k] = Units<T>::load(x.at(at(k)));
    if (whole < end) {
#pragma unroll
      for (int k = 0; k < n; ++k)
        if (at(k) == whole) unit[k] = x.load_rest();
    }
  }
  __device__ uint32_t at(int k) const { return first + k * lanes; }

  /// The group's scale by its own range, which becomes that of `group`. All threads of the block call it.
  template <class Source>
  __device__ GroupScale measure(const Source& x, const GroupTeams& teams, uint32_t group, int bits) const {
    Extremes<T> extremes;
#pragma unroll
    for (int k = 0; k < n; ++k)
      if (at(k) < end) extremes.add(Extremes<T>(unit[k]));
    float lo = extremes.lo(), hi = extremes.hi();
    if (first < end && !(lo >= -FLT_MAX && hi <= FLT_MAX)) {  // once more, by finite elements
      const GroupScale unbounded[1] = {Scales{}.of<0>(0)};
      Seen<1> seen;
#pragma unroll 1
      for (uint32_t u = first; u < end; u += lanes) seen.add(x.load(u), x.valid(u), unbounded);
      lo = seen.lo[0], hi = seen.hi[0];
      if (teams.nonfinite) atomicAdd(teams.nonfinite, static_cast<unsigned long long>(seen.nonfinite));
    }
    team_range(lo, hi, lanes);
    if (lo > hi) lo = hi = 0.0f;
    const float width = step_of_range(lo, hi, bits);
    if (teams.lane() == 0 && first < end) teams.step[group] = width, teams.offset[group] = lo;
    return group_scale(width, lo, bits);
  }
};

}  // namespace
}  // namespace mesa::kernels::cuda
