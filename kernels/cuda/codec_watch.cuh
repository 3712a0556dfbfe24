// What a pass over a tensor notes of its groups: minimum and maximum of the finite elements, and how many elements are saturated or not
// finite. Threads gather in registers, blocks in shared memory, and integer atomics make the order of all of it invisible.
#pragma once
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

/// What a pass is asked to note, and where to. If step_bits > 0, hi receives the step that spreads the range over codes of so many bits.
struct Watch {
  float *lo = nullptr, *hi = nullptr;  // [groups] each, or null
  int64_t* counts = nullptr;           // [2], or null
  int64_t groups = 0;
  int step_bits = 0;
  uint32_t* scratch = nullptr;  // 0 at first: the ranks, and how many blocks are done; null if no ranges are wanted

  static constexpr int64_t kShared = 2048;  ///< ranks of so many groups are gathered in shared memory first
  static constexpr int64_t kLate = 16384;   ///< more groups than this are too many for the last block to write

  bool wanted() const { return lo || hi || counts; }
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
  }

  /// At a kernel's end, by all threads, when all have put their ranges.
  __device__ void finish(uint32_t saturated, uint32_t nonfinite) const {
    if (counts) {
      const uint64_t both = block_reduce(uint64_t{nonfinite} << 32 | saturated, Sum{}, uint64_t{0});
      auto* const total = reinterpret_cast<unsigned long long*>(counts);
      if (threadIdx.x == 0 && (both & 0xffffffffu)) atomicAdd(&total[0], static_cast<unsigned long long>(both & 0xffffffffu));
      if (threadIdx.x == 0 && both >> 32) atomicAdd(&total[1], static_cast<unsigned long long>(both >> 32));
    }
    if (!scratch) return;
    __syncthreads();
    if (has_table()) {
      const uint32_t* const table = dynamic_shared<uint32_t>();
      for (int64_t i = threadIdx.x; i < 2 * groups; i += blockDim.x)
        if (table[i] != 0) atomicMax(&scratch[i], table[i]);
    }
    if (groups > kLate) return;  // write_ranges_kernel does the rest
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(&scratch[2 * groups], 1u) + 1 == gridDim.x * gridDim.y;
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (int64_t g = threadIdx.x; g < groups; g += blockDim.x) write(g);
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

/// A watch over a tensor's groups with its scratch memory, which must live until the pass is launched.
struct WatchedGroups {
  Watch watch;
  Tensor scratch;

  WatchedGroups() = default;
  WatchedGroups(const Tensor& x, const GroupLayout& layout, const Tensor& lo, const Tensor& hi, const Tensor& counts, int step_bits = 0) {
    watch = {lo.defined() ? per_group(lo, layout) : nullptr,
             hi.defined() ? per_group(hi, layout) : nullptr,
             count_pair(counts),
             layout.groups,
             step_bits,
             nullptr};
    if (!watch.lo && !watch.hi) return;
    scratch = Tensor::empty({2 * layout.groups + 1}, DType::i32, x.device());
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
