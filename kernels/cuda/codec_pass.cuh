// One pass over a tensor that packs its elements with given scales, notes their ranges, or both.
#pragma once
#include "codec_watch.cuh"

namespace mesa::kernels::cuda {
namespace {

// --- units: each in one group, or in eight ------------------------------------------------------------------------------------------

/// How blocks and their threads share out units, such that all units of a thread lie in the same group(s). Thread t of block (x, y) takes
/// the units x across + y down + t, and on by `step`, as far as x across + min(across, y down + reach); it has none if y down + t >= width.
struct Blocks {
  unsigned threads = 256, columns = 1;  // columns: in y
  uint32_t across = 0, down = 0, reach = 0, width = ~0u, step = 0;

  unsigned rows(uint32_t units) const { return static_cast<unsigned>(ceil_div(units, across)); }
  __device__ uint32_t begin() const { return blockIdx.x * across + blockIdx.y * down; }
  __device__ uint32_t end(uint32_t units) const {
    return threadIdx.x + blockIdx.y * down < width ? min(blockIdx.x * across + min(across, blockIdx.y * down + reach), units) : 0;
  }
};

/// Units that a thread takes at least, and blocks of a longer pass: as many as the multiprocessors hold at once.
inline constexpr int64_t kLeastUnits = 4, kPassBlocks = 132 * 6;

/// Blocks for G of UnitGroups; `across` is 0 if there is no good way. The steps of a strided tensor are whole rows.
inline Blocks share_units(const Tensor& x, const GroupLayout& layout, int G) {
  const int64_t units = ceil_div(x.numel(), kUnit), run = layout.inner * G / kUnit, width = width_of(x);
  const bool strided = x.row_stride() != width;
  int64_t period = layout.groups == 1 ? 1 : layout.consecutive ? 0 : layout.groups * layout.inner / kUnit;  // 0: groups do not recur
  if (strided) period = std::lcm(period, width / kUnit);
  const auto each = [&](int64_t threads) { return std::max(kLeastUnits, ceil_div(units, kPassBlocks * threads)); };
  const auto u32 = [](int64_t n) { return static_cast<uint32_t>(n); };
  Blocks blocks;
  if (period > 0 && period <= 512) {  // some whole periods side by side, if possible in whole warps
    const int64_t warps = std::lcm(period, int64_t{kWarp}), part = warps <= 512 ? warps : period;
    const int64_t step = part * std::max<int64_t>(1, 256 / part);
    blocks.threads = static_cast<unsigned>(ceil_div(step, kWarp) * kWarp);
    blocks.across = blocks.reach = u32(step * each(step));
    blocks.step = blocks.width = u32(step);
  } else if (!strided && run >= (period == 0 ? kWarp : kLeastUnits * kWarp)) {  // within a run of one group
    blocks.threads = static_cast<unsigned>(kWarp * std::clamp<int64_t>(run / (kLeastUnits * kWarp), 1, 8));
    blocks.across = u32(std::min(run, units));
    blocks.down = blocks.reach = u32(std::min(run, blocks.threads * each(blocks.threads)));
    blocks.columns = static_cast<unsigned>(ceil_div(blocks.across, blocks.down));
    blocks.step = blocks.threads;
  } else if (period > 0 && period <= 65535 * blocks.threads) {  // some columns of several periods
    blocks.across = blocks.reach = u32(period * std::min(each(blocks.threads), ceil_div(units, period)));
    blocks.down = blocks.threads;
    blocks.columns = static_cast<unsigned>(ceil_div(period, blocks.down));
    blocks.step = blocks.width = u32(period);
  }
  return blocks;
}

/// Where scales come from and codes go to; a pass that only measures has neither.
struct Job {
  GroupLayout layout;
  bool stochastic = false;
  RandomKey key{};
  Scales scales{};
  uint8_t* codes = nullptr;
};

/// bits 0: measures only.
template <class T, int G, int bits, bool stochastic, bool watched>
__global__ void __launch_bounds__(512, G == 1 ? 3 : 1) pass_units_kernel(Units<T> x, Blocks blocks, UnitGroups groups, Dither dither,
                                                                         Scales scales, uint8_t* __restrict__ codes, Watch watch) {
  const uint32_t end = blocks.end(x.count), whole = min(end, x.whole);
  uint32_t u = blocks.begin() + threadIdx.x;
  const uint32_t group = groups.of(min(u, x.count - 1));
  GroupScale scale[G];
#pragma unroll
  for (int i = 0; i < G; ++i) scale[i] = scales.of<bits>(int64_t{group} * G + i);
  Seen<G> seen;
  if constexpr (watched) watch.begin();

  const T* from = x.at(u);
  const int64_t distance = x.distance(blocks.step);
#pragma unroll(bits == 0 ? 4 : 1)
  for (; u < whole; u += blocks.step, from += distance) {
    const Unit<T> now = Units<T>::load(from);
    if constexpr (watched) seen.add(now, kUnit, scale);
    if constexpr (bits > 0) store_codes<bits>(codes, u, quantize_unit<bits, stochastic>(now, u, dither, scale));
  }
  if (u < end) {
    const Unit<T> rest = x.load_rest();
    if constexpr (watched) seen.add(rest, x.rest, scale);
    if constexpr (bits > 0)
      store_few_codes<bits>(codes + int64_t{u} * bits, quantize_unit<bits, stochastic>(rest, u, dither, scale), x.rest);
  }
  if constexpr (watched) {
    if (watch.scratch) put_ranges(watch, group, seen);
    watch.finish(seen.saturated, seen.nonfinite);
  }
}

template <int bits>
void pass_units(const char* name, const Tensor& x, const Job& job, int G, const Blocks& blocks, const Watch& watch) {
  dispatch_units(x.dtype(), G, [&](auto tag, auto each) {
    using T = decltype(tag);
    constexpr int kEach = decltype(each)::value;
    const Units<T> units = units_of<T>(x);
    const auto run = [&](auto kernel) {
      launch(name, kernel, dim3(blocks.rows(units.count), blocks.columns), blocks.threads, watch.shared_bytes(), units, blocks,
             UnitGroups(job.layout, kEach), Dither(job.key), job.scales, job.codes, watch);
    };
    const auto choose = [&](auto watched) {
      constexpr bool kWatched = decltype(watched)::value;
      if constexpr (bits == 0)
        run(&pass_units_kernel<T, kEach, 0, false, kWatched>);
      else if (job.stochastic)
        run(&pass_units_kernel<T, kEach, bits, true, kWatched>);
      else
        run(&pass_units_kernel<T, kEach, bits, false, kWatched>);
    };
    if (bits == 0 || watch.wanted())
      choose(std::true_type{});
    else if constexpr (bits > 0)
      choose(std::false_type{});
  });
}

// --- elements: any layout, stride and alignment -------------------------------------------------------------------------------------

/// A tensor and its groups, element by element.
template <class T>
struct Elements {
  const T* data;
  int64_t count, width, stride;
  GroupLayout layout;
};
template <class T>
Elements<T> elements_of(const Tensor& x, const GroupLayout& layout) {
  return {x.data<T>(), x.numel(), width_of(x), x.row_stride(), layout};
}

/// Follows elements and their groups in logical order, with divisions at the start only.
template <class T>
struct Cursor {
  const Elements<T>& x;
  int64_t row, column, within, group;

  __device__ Cursor(const Elements<T>& x, int64_t e)
      : x(x), row(e / x.width), column(e % x.width), within(e % x.layout.inner), group(e / x.layout.inner % x.layout.groups) {}
  __device__ float value() const { return static_cast<float>(load(x.data + row * x.stride + column)); }
  __device__ void advance() {
    if (++column == x.width) column = 0, ++row;
    if (++within < x.layout.inner) return;
    within = 0;
    if (++group == x.layout.groups) group = 0;
  }
};

template <class T, int bits>
__global__ void pass_elements_kernel(Elements<T> x, bool stochastic, RandomKey key, Scales scales, uint8_t* codes, Watch watch) {
  int64_t group = -1;
  GroupScale scale{};
  Seen<1> seen;
  watch.begin();
  for (int64_t e = global_index() * kUnit; e < x.count; e += global_stride() * kUnit) {
    const Philox4 random = stochastic ? philox(static_cast<uint64_t>(e) / kUnit, key.now(), key.key) : Philox4{};
    Cursor<T> at(x, e);
    uint64_t word = 0;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      if (e + i >= x.count) break;
      if (at.group != group) {
        if (watch.scratch && group >= 0) watch.put(group, seen.lo[0], seen.hi[0]);
        seen.forget_ranges();
        group = at.group;
        scale = scales.of<bits>(group);
      }
      const float v = at.value();
      seen.add(0, v, scale);
      if constexpr (bits > 0) {
        const float up = stochastic ? dither_value(static_cast<uint16_t>(random.word[i / 2] >> i % 2 * 16)) : 0.5f;
        word |= uint64_t{quantize_value(v - scale.offset, scale.inverse, up, top_code(bits))} << i * bits;
      }
      at.advance();
    }
    if constexpr (bits > 0) store_few_codes<bits>(codes + e / kUnit * bits, word, static_cast<int>(min(x.count - e, int64_t{kUnit})));
  }
  if (watch.scratch && group >= 0) watch.put(group, seen.lo[0], seen.hi[0]);
  watch.finish(seen.saturated, seen.nonfinite);
}

template <int bits>
void pass_elements(const char* name, const Tensor& x, const Job& job, const Watch& watch) {
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    launch(name, &pass_elements_kernel<T, bits>, grid_for(x.numel(), kUnit * 256), 256, watch.shared_bytes(), elements_of<T>(x, job.layout),
           job.stochastic, job.key, job.scales, job.codes, watch);
  };
  if (x.dtype() == DType::f64)
    run(double{});
  else
    dispatch_narrow(x.dtype(), run);
}

// --- either ---------------------------------------------------------------------------------------------------------------------------

/// The pass over x, which is not empty; bits 0 measures only.
template <int bits>
void pass(const char* name, const Tensor& x, const Job& job, const WatchedGroups& groups) {
  const int G = has_units(x) && aligned(job.codes, std::max(bits, 1)) ? unit_groups(job.layout, x.numel()) : 0;
  const Blocks blocks = G > 0 ? share_units(x, job.layout, G) : Blocks{};
  if (blocks.across > 0)
    pass_units<bits>(name, x, job, G, blocks, groups.watch);
  else
    pass_elements<bits>(name, x, job, groups.watch);
  groups.finish(true);
}

}  // namespace
}  // namespace mesa::kernels::cuda
