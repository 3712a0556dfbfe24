// Quantization: q = clamp(floor(fma(x - offset, 1/step, u)), 0, 2^bits - 1), packed; u = 1/2 or Philox dither.
#include "codec_groups.cuh"
#include "codec_pass.cuh"

namespace mesa::kernels::cuda {
namespace {

// --- short consecutive groups: measured and packed in one visit ---------------------------------------------------------------------

template <class T, int bits, bool stochastic>
__global__ void quantize_short_groups_kernel(Units<T> x, GroupTeams teams, Dither dither, uint8_t* __restrict__ codes) {
  const uint32_t group = (blockIdx.x * blockDim.x + threadIdx.x) >> teams.log_lanes;
  const HeldGroup<T, kTeamUnits> held(x, teams, group < teams.groups ? group * teams.units : x.count);
  const GroupScale scale[1] = {held.measure(x, teams, group, bits)};
  CodeWord<bits> words[kTeamUnits];
#pragma unroll
  for (int k = 0; k < kTeamUnits; ++k) words[k] = quantize_unit<bits, stochastic>(held.unit[k], held.at(k), dither, scale);
#pragma unroll
  for (int k = 0; k < kTeamUnits; ++k) {
    const uint32_t u = held.at(k);
    if (u >= held.end) continue;
    if (u < x.whole)
      store_codes<bits>(codes, u, words[k]);
    else
      store_few_codes<bits>(codes + int64_t{u} * bits, words[k], x.rest);
  }
}

template <int bits>
void quantize_short_groups(const Tensor& x, const GroupLayout& layout, bool stochastic, RandomKey key, float* step, float* offset,
                           uint8_t* codes, int64_t* counts) {
  const GroupTeams teams = group_teams(layout, kTeamUnits, step, offset, counts);
  dispatch_narrow(x.dtype(), [&](auto tag) {
    using T = decltype(tag);
    launch("quantize_current", stochastic ? &quantize_short_groups_kernel<T, bits, true> : &quantize_short_groups_kernel<T, bits, false>,
           teams.blocks(), teams.threads(), 0, units_of<T>(x), teams, Dither(key), codes);
  });
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

void quantize_running(const Tensor& x, const Coding& into) {
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
  const bool one_visit = are_short_groups(layout, x.numel()) && has_units(x) && aligned(bytes, bits);
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
