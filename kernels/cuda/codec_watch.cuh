// What a pass over a tensor notes of its groups: minimum and maximum of the finite elements, and how many elements are saturated or not
// finite. Threads gather in registers, blocks in shared memory, and integer atomics make the order of all of it invisible.
#pragma once
#include <limits>

#include "codec.cuh"

namespace mesa::kernels::cuda {
namespace {

struct Minimum {
  __device__ float operator()(float a, float b) const { return minimum(a, b); }
};
struct Maximum {
  __device__ float operator()(float a, float b) const { return maximum(a, b); }
};

inline constexpr float kEmptyLo = std::numeric_limits<float>::infinity(), kEmptyHi = -kEmptyLo;

/// Minimum and maximum of units; NaN if an element is.
template <class T>
struct Extremes;
template <>
struct Extremes<float> {
  float min = kEmptyLo, max = kEmptyHi;
  __device__ Extremes() {}
  __device__ explicit Extremes(const Unit<float>& x) : min(x[0]), max(x[0]) {
#pragma unroll
    for (int i = 1; i < kUnit; ++i) min = minimum(min, x[i]), max = maximum(max, x[i]);
  }
  __device__ void add(const Extremes& other) { min = minimum(min, other.min), max = maximum(max, other.max); }
  __device__ float lo() const { return min; }
  __device__ float hi() const { return max; }
};
template <>
struct Extremes<bf16> {
  uint32_t min = 0x7f807f80u, max = 0xff80ff80u;  // two at a time
  __device__ Extremes() {}
  __device__ explicit Extremes(const Unit<bf16>& x) : min(x.pair[0]), max(x.pair[0]) {
#pragma unroll
    for (int i = 1; i < kUnit / 2; ++i) min = minimum_bf16(min, x.pair[i]), max = maximum_bf16(max, x.pair[i]);
  }
  __device__ void add(const Extremes& other) { min = minimum_bf16(min, other.min), max = maximum_bf16(max, other.max); }
  __device__ float lo() const { return minimum(scalar::float_of(min << 16), scalar::float_of(min & 0xffff0000u)); }
  __device__ float hi() const { return maximum(scalar::float_of(max << 16), scalar::float_of(max & 0xffff0000u)); }
};

/// The range of `lanes` neighbouring lanes together, a power of two.
__device__ inline void neighbours_range(float& lo, float& hi, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    lo = minimum(lo, __shfl_xor_sync(kFullMask, lo, distance));
    hi = maximum(hi, __shfl_xor_sync(kFullMask, hi, distance));
  }
}

__device__ inline bool is_finite(float x) { return is_finite_key(ordered_key(x)); }

/// What one thread has seen of G groups (element i of a unit belongs to group i % G).
template <int G>
struct Seen {
  float lo[G], hi[G];
  uint32_t saturated = 0, nonfinite = 0;

  __device__ Seen() { forget_ranges(); }
  __device__ void forget_ranges() {
#pragma unroll
    for (int i = 0; i < G; ++i) lo[i] = kEmptyLo, hi[i] = kEmptyHi;
  }

  __device__ void add(int i, float x, const GroupScale& scale) {
    if (!is_finite(x)) {
      ++nonfinite;
      return;
    }
    lo[i] = minimum(lo[i], x), hi[i] = maximum(hi[i], x);
    saturated += is_saturated(x - scale.offset, scale);
  }

  /// Adds the first `valid` elements of a unit (the others repeat them); scale[i % G] is element i's. The unit's own range tells whether
  /// anything in it is odd, and only then is each element looked at.
  template <class T>
  __device__ void add(const Unit<T>& x, int valid, const GroupScale (&scale)[G]) {
    const Extremes<T> all(x);
    const float least = all.lo(), greatest = all.hi();
    bool plain = least >= -FLT_MAX && greatest <= FLT_MAX;
#pragma unroll
    for (int i = 0; i < G; ++i) {
      const float low = G == 1 ? least : x[i], high = G == 1 ? greatest : x[i];
      plain &= !(low - scale[i].offset < scale[i].low) && !(high - scale[i].offset > scale[i].high);
    }
    if (plain) {
#pragma unroll
      for (int i = 0; i < G; ++i) lo[i] = minimum(lo[i], G == 1 ? least : x[i]), hi[i] = maximum(hi[i], G == 1 ? greatest : x[i]);
      return;
    }
#pragma unroll
    for (int i = 0; i < kUnit; ++i)
      if (i < valid) add(i % G, x[i], scale[i % G]);
  }
};

// Ranges meet as unsigned ranks, of which the largest counts: ~rank for the minimum. 0 is the rank of a NaN and stands for an empty group.
__device__ inline uint32_t rank_of(float x) { return static_cast<uint32_t>(ordered_key(x)) ^ 0x80000000u; }
__device__ inline float of_rank(uint32_t rank) { return key_value(static_cast<int32_t>(rank ^ 0x80000000u)); }

__device__ inline void raise(uint32_t* low, uint32_t* high, float lo, float hi) {
  if (lo > hi) return;
  atomicMax(low, ~rank_of(lo));
  atomicMax(high, rank_of(hi));
}

/// Running estimates that a pass takes on when it has seen all, and the scales that its codes were made with (see Coding).
struct Estimates {
  const float *alpha = nullptr, *beta = nullptr;
  float *next_alpha = nullptr, *next_beta = nullptr, *step = nullptr, *offset = nullptr;
  double decay = 0;
  float top = 0;

  __device__ void take(int64_t g, float lo, float hi) const {
    const RangeEstimate old{alpha[g], beta[g]}, next = averaged_range(old, lo, hi, decay);
    step[g] = old.alpha / top, offset[g] = old.beta;
    next_alpha[g] = next.alpha, next_beta[g] = next.beta;
  }
};

/// What a pass is asked to note, and where to. If step_bits > 0, hi receives the step that spreads the range over codes of so many bits.
struct Watch {
  float *lo = nullptr, *hi = nullptr;  // [groups] each, or null
  int64_t* counts = nullptr;           // [2], or null
  int64_t groups = 0;
  int step_bits = 0;
  Estimates estimates{};
  uint32_t* scratch = nullptr;  // all 0 before and after: the ranks, and how many blocks are done; null if no ranges are wanted

  static constexpr int64_t kShared = 2048;  ///< ranks of so many groups are gathered in shared memory first
  static constexpr int64_t kLate = 16384;   ///< more groups than this are too many for the last block to write

  bool wanted() const { return scratch || counts; }
  bool late() const { return groups > kLate; }
  size_t shared_bytes() const { return scratch && groups <= kShared ? 2 * groups * sizeof(uint32_t) : 0; }

  __device__ bool has_table() const { return groups <= kShared; }
  /// Adds a range of group g. Two calls, for atomics on shared memory are instructions of their own.
  __device__ void put(int64_t g, float lo, float hi) const {
    uint32_t* const table = dynamic_shared<uint32_t>();
    if (has_table())
      raise(table + g, table + groups + g, lo, hi);
    else
      raise(scratch + g, scratch + groups + g, lo, hi);
  }

  /// The same past any table, for kernels whose shared memory is their own; is_last_block and write_all end such a pass.
  __device__ void put_directly(int64_t g, float lo, float hi) const { raise(scratch + g, scratch + groups + g, lo, hi); }

  /// At a kernel's beginning, by all threads.
  __device__ void begin() const {
    if (!scratch || !has_table()) return;
    for (int64_t i = threadIdx.x; i < 2 * groups; i += blockDim.x) dynamic_shared<uint32_t>()[i] = 0;
    __syncthreads();
  }

  __device__ void write(int64_t g) const {
    const uint32_t low = __ldcg(&scratch[g]), high = __ldcg(&scratch[groups + g]);
    const float least = high == 0 ? 0.0f : of_rank(~low), greatest = high == 0 ? 0.0f : of_rank(high);
    if (lo) lo[g] = least;
    if (hi) hi[g] = step_bits > 0 ? step_of_range(least, greatest, step_bits) : greatest;
    if (estimates.alpha) estimates.take(g, least, greatest);
    scratch[g] = scratch[groups + g] = 0;
  }
  /// All groups, by one block.
  __device__ void write_all() const {
    for (int64_t g = threadIdx.x; g < groups; g += blockDim.x) write(g);
  }

  __device__ void count(uint32_t saturated, uint32_t nonfinite) const {
    auto* const total = reinterpret_cast<unsigned long long*>(counts);
    if (saturated > 0) atomicAdd(&total[0], static_cast<unsigned long long>(saturated));
    if (nonfinite > 0) atomicAdd(&total[1], static_cast<unsigned long long>(nonfinite));
  }

  /// True for all threads of the last block that comes here, which sees what the others have put.
  __device__ bool is_last_block() const {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      uint32_t* const done = scratch + 2 * groups;
      last = atomicAdd(done, 1u) + 1 == gridDim.x * gridDim.y;
      if (last) *done = 0;
    }
    __syncthreads();
    if (last) __threadfence();
    return last;
  }

  /// At a kernel's end, by all threads, when all have put their ranges.
  __device__ void finish(uint32_t saturated, uint32_t nonfinite) const {
    if (counts) {
      const uint64_t both = block_reduce(uint64_t{nonfinite} << 32 | saturated, Sum{}, uint64_t{0});
      if (threadIdx.x == 0) count(static_cast<uint32_t>(both), static_cast<uint32_t>(both >> 32));
    }
    if (!scratch) return;
    __syncthreads();
    if (has_table()) {
      const uint32_t* const table = dynamic_shared<uint32_t>();
      for (int64_t i = threadIdx.x; i < 2 * groups; i += blockDim.x)
        if (table[i] != 0) atomicMax(&scratch[i], table[i]);
    }
    if (groups <= kLate && is_last_block()) write_all();  // otherwise write_ranges_kernel does the rest
  }
};

/// Puts the ranges of a whole warp, all of whose lanes call this; often they share a group.
template <int G>
__device__ inline void put_ranges(const Watch& watch, uint32_t group, const Seen<G>& seen) {
  const bool same = __all_sync(kFullMask, group == __shfl_sync(kFullMask, group, 0));
#pragma unroll
  for (int i = 0; i < G; ++i) {
    float lo = seen.lo[i], hi = seen.hi[i];
    if (same) lo = warp_reduce(lo, Minimum{}), hi = warp_reduce(hi, Maximum{});
    if (!same || threadIdx.x % kWarp == 0) watch.put(int64_t{group} * G + i, lo, hi);
  }
}

__global__ void write_ranges_kernel(Watch watch) {
  for (int64_t g = global_index(); g < watch.groups; g += global_stride()) watch.write(g);
}

}  // namespace

/// Scratch for a Watch of at most kLate groups. All passes share it, one after another on the stream; those that run in one kernel have
/// different slots.
inline constexpr int kScratchSlots = 3;
uint32_t* watch_scratch(int slot);

namespace {

/// A watch over a tensor's groups with its scratch memory, which must live until the pass is launched.
struct WatchedGroups {
  Watch watch;
  Tensor scratch;  // of more than kLate groups

  WatchedGroups() = default;
  WatchedGroups(const GroupLayout& layout, const Tensor& lo, const Tensor& hi, const Tensor& counts, int step_bits = 0) {
    watch.lo = lo.defined() ? per_group(lo, layout) : nullptr;
    watch.hi = hi.defined() ? per_group(hi, layout) : nullptr;
    watch.counts = count_pair(counts);
    watch.groups = layout.groups;
    watch.step_bits = step_bits;
    if (watch.lo || watch.hi) take_scratch(0);
  }
  explicit WatchedGroups(const Coding& into, int slot = 0) : WatchedGroups(into.layout, {}, {}, into.counts) {
    const auto each = [&](const Tensor& t) { return per_group(t, into.layout); };
    watch.estimates = {each(into.alpha),  each(into.beta), each(into.next_alpha), each(into.next_beta), each(into.step),
                       each(into.offset), into.decay,      top_code(into.bits)};
    take_scratch(slot);
  }
  void take_scratch(int slot) {
    if (!watch.late()) {
      watch.scratch = watch_scratch(slot);
      return;
    }
    scratch = Tensor::empty({2 * watch.groups + 1}, DType::i32, kCuda);
    clear(scratch);
    watch.scratch = reinterpret_cast<uint32_t*>(scratch.data<int32_t>());
  }
  /// To be called after the pass; `passed` false: there was nothing to pass over.
  void finish(bool passed) const {
    if (watch.scratch && watch.groups > 0 && (watch.late() || !passed))
      launch("write_ranges", &write_ranges_kernel, grid_for(watch.groups, 256), 256, 0, watch);
  }
};

}  // namespace

/// group_range; `hi` receives steps if step_bits > 0 (see Watch).
void measure_groups(const Tensor& x, const GroupLayout& layout, const Tensor& lo, const Tensor& hi, const Tensor& counts, int step_bits);

}  // namespace mesa::kernels::cuda
