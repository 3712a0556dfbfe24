// Minimum and maximum of groups: as ordered integer keys, so that neither the order nor the number of threads can show.
#pragma once
#include <utility>

#include "codec_lanes.h"
#include "codec_span.h"

namespace mesa::kernels::MESA_ISA {
namespace {

/// Minimum and maximum as ordered keys. Empty: min > max.
struct Extremes {
  int32_t min = INT32_MAX, max = INT32_MIN;

  bool empty() const { return min > max; }
  bool all_finite() const { return empty() || (min > kKeyMinusInfinity && max < kKeyPlusInfinity); }
  float lo() const { return empty() ? 0.0f : key_value(min); }
  float hi() const { return empty() ? 0.0f : key_value(max); }
  void add(const Extremes& other) {
    min = std::min(min, other.min);
    max = std::max(max, other.max);
  }
};

using LaneIndices = std::make_index_sequence<kLanes>;

/// min[i] = the smaller of v[i] and v[i ^ distance].
template <int distance, size_t... i>
inline IntLanes min_across(IntLanes v, std::index_sequence<i...>) {
  const IntLanes other = __builtin_shufflevector(v, v, static_cast<int>(i ^ distance)...);
  return other < v ? other : v;
}

/// The smallest lane of a in every lane of the lower half, and that of b in the upper half: one tree for both.
template <size_t... i>
inline IntLanes min_of_halves(IntLanes a, IntLanes b, std::index_sequence<i...> lanes) {
  constexpr int n = kLanes;
  const IntLanes low = __builtin_shufflevector(a, b, static_cast<int>(i < n / 2 ? i : i + n / 2)...);
  const IntLanes high = __builtin_shufflevector(a, b, static_cast<int>(i < n / 2 ? i + n / 2 : i + n)...);
  IntLanes v = low < high ? low : high;
  if constexpr (n >= 16) v = min_across<4>(v, lanes);
  if constexpr (n >= 8) v = min_across<2>(v, lanes);
  return min_across<1>(v, lanes);
}

/// Calls f(x from a whole vector on, mask of its lanes to count) over n >= kLanes elements. The last vector overlaps the one before:
/// an extreme may see an element twice, a count may not.
template <class F>
inline void for_vectors(const float* x, int64_t n, F&& f) {
  const IntLanes all = IntLanes{} - 1;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(x + i, all);
  if (i < n) f(x + n - kLanes, kLaneNumber >= static_cast<int32_t>(i + kLanes - n));
}

/// The extremes of each lane of a vector; reduced to one only at the end, for that costs as much as 64 elements.
struct LaneExtremes {
  IntLanes min = IntLanes{} + INT32_MAX, max = IntLanes{} + INT32_MIN;

  /// Adds n elements; if `counting`, takes 1 from a lane of `saturated` (a vector of masks is 0 or -1) for each outside the scale's range.
  template <bool counting>
  void add(const float* x, int64_t n, const GroupScale& s, IntLanes& saturated) {
    if (n < kLanes) [[unlikely]] return add_few<counting>(x, n, s, saturated);
    IntLanes low = min, high = max, outside = saturated;
    for_vectors(x, n, [&](const float* from, const IntLanes& counted) {
      IntLanes key = load_lanes<IntLanes>(from);
      key ^= (key >> 31) & 0x7fffffff;
      low = key < low ? key : low;
      high = key > high ? key : high;
      if constexpr (counting) {
        const FloatLanes d = load_lanes<FloatLanes>(from) - s.offset;
        outside += ((d < s.low) | (d > s.high)) & counted;
      }
    });
    min = low, max = high, saturated = outside;
  }
  template <bool counting>
  void add_few(const float* x, int64_t n, const GroupScale& s, IntLanes& saturated) {
    for (int64_t i = 0; i < n; ++i) {
      const int32_t key = ordered_key(x[i]);
      min[0] = std::min<int32_t>(min[0], key);
      max[0] = std::max<int32_t>(max[0], key);
      if constexpr (counting) saturated[0] -= is_saturated(x[i] - s.offset, s);
    }
  }
  void add(const LaneExtremes& other) {
    min = other.min < min ? other.min : min;
    max = other.max > max ? other.max : max;
  }
  Extremes reduce() const {
    const IntLanes halves = min_of_halves(min, ~max, LaneIndices{});  // ~ turns the order around
    return {halves[0], ~halves[kLanes / 2]};
  }
};

inline Extremes extremes(const float* x, int64_t n) {
  LaneExtremes lanes;
  IntLanes none{};
  lanes.add<false>(x, n, {}, none);
  return lanes.reduce();
}

/// The same over finite elements only; the others are counted.
inline Extremes finite_extremes(const float* x, int64_t n, int64_t& nonfinite) {
  Extremes result;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t key = ordered_key(x[i]);
    if (is_finite_key(key)) result.add({key, key});
    else ++nonfinite;
  }
  return result;
}

// ---- Watches: what a thread notes of the runs it meets ---------------------------------------------------------------------------------
// `walk` is the layout that for_runs follows. note() takes elements into the extremes, and with `counting` counts those outside the range.
// Infinities and NaNs are noted as they are and show in the result; they are rare enough for a second, careful pass. Each thread works on a
// copy and merges it.

/// Notes nothing.
template <bool by_element>
struct NoWatch {
  static constexpr bool kWatches = false, kByElement = by_element;
  GroupLayout walk;

  explicit NoWatch(const GroupLayout& layout) : walk(by_element ? period_layout(layout) : layout) {}
  void merge(const NoWatch&) {}
  int64_t saturated() const { return 0; }
};

/// Counts in lanes, 0 or -1 at a time.
struct LaneCount {
  IntLanes lanes{};

  int64_t total() const {
    int64_t sum = 0;
    for (int i = 0; i < kLanes; ++i) sum -= lanes[i];
    return sum;
  }
};

/// Lane extremes of each group.
struct RunWatch {
  static constexpr bool kWatches = true, kByElement = false;
  GroupLayout walk;
  std::vector<LaneExtremes> groups;
  LaneCount count;
  int64_t merged = 0;

  explicit RunWatch(const GroupLayout& layout) : walk(layout), groups(layout.groups) {}
  template <bool counting>
  void note(int64_t g, int64_t, const float* x, int64_t n, const GroupScale& s) {
    groups[g].add<counting>(x, n, s, count.lanes);
  }
  void merge(const RunWatch& other) {
    for (size_t g = 0; g < groups.size(); ++g) groups[g].add(other.groups[g]);
    merged += other.count.total();
  }
  int64_t saturated() const { return merged; }
  void finish(Extremes* found) const {
    for (size_t g = 0; g < groups.size(); ++g) found[g] = groups[g].reduce();
  }
};

/// Short consecutive groups: each belongs to one thread, so all write to one table.
struct GroupWatch {
  static constexpr bool kWatches = true, kByElement = false;
  GroupLayout walk;
  Extremes* found;
  LaneCount count;
  int64_t merged = 0;

  GroupWatch(const GroupLayout& layout, Extremes* found) : walk(layout), found(found) {}
  template <bool counting>
  void note(int64_t g, int64_t, const float* x, int64_t n, const GroupScale& s) {
    LaneExtremes run;
    run.add<counting>(x, n, s, count.lanes);
    found[g].add(run.reduce());
  }
  void merge(const GroupWatch& other) { merged += other.count.total(); }
  int64_t saturated() const { return merged; }
  void finish(Extremes*) const {}
};

/// Extremes of each element of a period, for runs shorter than a vector; what is saturated is counted where the tables of scales are.
struct ElementWatch {
  static constexpr bool kWatches = true, kByElement = true;
  GroupLayout layout, walk;
  std::vector<int32_t> min, max;
  int64_t counted = 0;

  explicit ElementWatch(const GroupLayout& layout)
      : layout(layout), walk(period_layout(layout)), min(walk.inner, INT32_MAX), max(walk.inner, INT32_MIN) {}
  template <bool counting>
  void note(int64_t, int64_t within, const float* __restrict x, int64_t n, const GroupScale&) {
    int32_t *__restrict low = min.data() + within, *__restrict high = max.data() + within;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t key = ordered_key(x[i]);
      low[i] = std::min(low[i], key);
      high[i] = std::max(high[i], key);
    }
  }
  void merge(const ElementWatch& other) {
    for (size_t i = 0; i < min.size(); ++i) {
      min[i] = std::min(min[i], other.min[i]);
      max[i] = std::max(max[i], other.max[i]);
    }
    counted += other.counted;
  }
  int64_t saturated() const { return counted; }
  void finish(Extremes* found) const {
    for (size_t i = 0; i < min.size(); ++i) found[i / layout.inner % layout.groups].add({min[i], max[i]});
  }
};

/// Calls f with the watch that suits the layout; `found` holds one Extremes for each group and is ready after finish().
template <class F>
void with_watch(const GroupLayout& layout, Extremes* found, F&& f) {
  const auto run = [&](auto watch) {
    f(watch);
    watch.finish(found);
  };
  if (is_elementwise(layout)) run(ElementWatch(layout));
  else if (is_short_groups(layout)) run(GroupWatch(layout, found));
  else run(RunWatch(layout));
}

/// The careful pass: extremes of finite elements, each of which is also shown to f(group, x); returns the number of the others.
template <class F>
int64_t careful_scan(const Rows& rows, const GroupLayout& layout, int64_t n, std::vector<Extremes>& found, F&& f) {
  alignas(64) float buffer[kPiece];
  int64_t nonfinite = 0;
  std::fill(found.begin(), found.end(), Extremes{});
  for (int64_t from = 0; from < n; from += kPiece) {
    const int64_t count = std::min(kPiece, n - from);
    const float* x = rows.load(from, count, buffer);
    for_runs(layout, from, count, [&](int64_t g, int64_t, int64_t first, int64_t run) {
      found[g].add(finite_extremes(x + first, run, nonfinite));
      for (int64_t i = first; i < first + run; ++i) {
        if (is_finite_key(ordered_key(x[i]))) f(g, x[i]);
      }
    });
  }
  return nonfinite;
}

inline bool all_finite(const std::vector<Extremes>& found) {
  return std::all_of(found.begin(), found.end(), [](const Extremes& e) { return e.all_finite(); });
}

}  // namespace
}  // namespace mesa::kernels::MESA_ISA
