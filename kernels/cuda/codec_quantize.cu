// Quantization: q = clamp(floor(fma(x - offset, 1/step, u)), 0, 2^bits - 1), packed; u = 1/2 or Philox dither.
#include "codec_pass.cuh"

namespace mesa::kernels::cuda {
namespace {

// --- short consecutive groups: measured and packed in one visit ---------------------------------------------------------------------

/// The largest group is that of a block of 512 threads.
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

/// 2^log_lanes threads take a group of at most kTeamUnits times as many units. All compute on whatever they hold, so that no branch parts
/// them.
template <class T, int bits, bool stochastic>
__global__ void quantize_short_groups_kernel(Units<T> x, uint32_t group_units, uint32_t groups, int log_lanes, Dither dither,
                                             float* __restrict__ step, float* __restrict__ offset, uint8_t* __restrict__ codes,
                                             unsigned long long* nonfinite) {
  const uint32_t lanes = 1u << log_lanes, lane = threadIdx.x & (lanes - 1), group = (blockIdx.x * blockDim.x + threadIdx.x) >> log_lanes;
  const uint32_t begin = group * group_units, end = group < groups ? min(begin + group_units, x.count) : begin, whole = min(end, x.whole);
  const uint32_t first = begin + lane;
  Unit<T> held[kTeamUnits]{};
#pragma unroll
  for (int k = 0; k < kTeamUnits; ++k)
    if (const uint32_t u = first + k * lanes; u < whole) held[k] = Units<T>::load(x.at(u));
  if (whole < end) {
#pragma unroll
    for (int k = 0; k < kTeamUnits; ++k)
      if (first + k * lanes == whole) held[k] = x.load_rest();
  }

  Extremes<T> extremes;
#pragma unroll
  for (int k = 0; k < kTeamUnits; ++k)
    if (first + k * lanes < end) extremes.add(Extremes<T>(held[k]));
  float lo = extremes.lo(), hi = extremes.hi();
  if (first < end && !(lo >= -FLT_MAX && hi <= FLT_MAX)) {  // once more, by finite elements
    const GroupScale unbounded[1] = {Scales{}.of<0>(0)};
    Seen<1> seen;
#pragma unroll 1
    for (uint32_t u = first; u < end; u += lanes) seen.add(x.load(u), x.valid(u), unbounded);
    lo = seen.lo[0], hi = seen.hi[0];
    if (nonfinite) atomicAdd(nonfinite, static_cast<unsigned long long>(seen.nonfinite));
  }
  team_range(lo, hi, lanes);
  if (lo > hi) lo = hi = 0.0f;

  const float width = step_of_range(lo, hi, bits);
  if (lane == 0 && begin < end) step[group] = width, offset[group] = lo;
  const GroupScale scale[1] = {group_scale(width, lo, bits)};
  CodeWord<bits> words[kTeamUnits];
#pragma unroll
  for (int k = 0; k < kTeamUnits; ++k) words[k] = quantize_unit<bits, stochastic>(held[k], first + k * lanes, dither, scale);
#pragma unroll
  for (int k = 0; k < kTeamUnits; ++k) {
    const uint32_t u = first + k * lanes;
    if (u < whole)
      store_codes<bits>(codes, u, words[k]);
    else if (u < end)
      store_few_codes<bits>(codes + int64_t{u} * bits, words[k], x.rest);
  }
}

template <int bits>
void quantize_short_groups(const Tensor& x, const GroupLayout& layout, bool stochastic, RandomKey key, float* step, float* offset,
                           uint8_t* codes, int64_t* counts) {
  const int64_t units = layout.inner / kUnit;
  int log_lanes = 0;
  while (kTeamUnits << log_lanes < units) ++log_lanes;
  const int64_t lanes = int64_t{1} << log_lanes, threads = lanes > kWarp ? lanes : 256;
  auto* const nonfinite = counts ? reinterpret_cast<unsigned long long*>(counts + 1) : nullptr;
  dispatch_narrow(x.dtype(), [&](auto tag) {
    using T = decltype(tag);
    launch("quantize_current", stochastic ? &quantize_short_groups_kernel<T, bits, true> : &quantize_short_groups_kernel<T, bits, false>,
           static_cast<unsigned>(ceil_div(layout.groups * lanes, threads)), static_cast<unsigned>(threads), 0, units_of<T>(x),
           static_cast<uint32_t>(units), static_cast<uint32_t>(layout.groups), log_lanes, Dither(key), step, offset, codes, nonfinite);
  });
}

bool is_short_groups(const Tensor& x, const GroupLayout& layout, const uint8_t* codes, int bits) {
  return layout.consecutive && layout.inner <= kLongest && unit_groups(layout, x.numel()) == 1 && has_units(x) && aligned(codes, bits);
}

}  // namespace

void quantize(const Tensor& x, GroupLayout layout, int bits, bool stochastic, RandomKey key, const Tensor& step, const Tensor& offset,
              const Tensor& codes, const Tensor& lo, const Tensor& hi, const Tensor& counts) {
  check_layout(x, layout);
  const Job job{layout, stochastic, key, {per_group(step, layout), per_group(offset, layout)}, code_bytes(codes, x.numel(), bits)};
  const WatchedGroups groups(layout, lo, hi, counts);
  if (x.numel() == 0) return groups.finish(false);
  dispatch_bits(bits, [&](auto n) { pass<decltype(n)::value>("quantize", x, job, groups); });
}

void quantize_running(const Tensor& x, const RunningCodes& into) {
  check_layout(x, into.layout);
  const WatchedGroups groups(into);
  const Estimates& now = groups.watch.estimates;
  const Job job{into.layout, into.stochastic, into.key, {now.alpha, now.beta, now.top}, code_bytes(into.codes, x.numel(), into.bits)};
  if (x.numel() == 0) return groups.finish(false);
  dispatch_bits(into.bits, [&](auto n) { pass<decltype(n)::value>("quantize_running", x, job, groups); });
}

void quantize_current(const Tensor& x, GroupLayout layout, int bits, bool stochastic, RandomKey key, const Tensor& step,
                      const Tensor& offset, const Tensor& codes, const Tensor& counts) {
  check_layout(x, layout);
  float *const steps = per_group(step, layout), *const offsets = per_group(offset, layout);
  uint8_t* const bytes = code_bytes(codes, x.numel(), bits);
  if (x.numel() == 0) return;
  const bool one_visit = is_short_groups(x, layout, bytes, bits);
  if (!one_visit) measure_groups(x, layout, offset, step, counts, bits);
  dispatch_bits(bits, [&](auto n) {
    constexpr int kBits = decltype(n)::value;
    if (one_visit)
      quantize_short_groups<kBits>(x, layout, stochastic, key, steps, offsets, bytes, count_pair(counts));
    else
      pass<kBits>("quantize_current", x, {layout, stochastic, key, {steps, offsets}, bytes}, {});
  });
}

}  // namespace mesa::kernels::cuda
