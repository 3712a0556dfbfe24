// Quantization: q = clamp(floor(fma(x - offset, 1/step, u)), 0, 2^bits - 1), packed; u = 1/2 or Philox dither.
#include "codec_dither.h"
#include "codec_extremes.h"

namespace mesa::kernels::MESA_ISA {
namespace {

struct Job {
  GroupLayout layout;
  int bits;
  RandomKey key;
  float *step, *offset;
  uint8_t* codes;

  GroupScale scale(int64_t g) const { return group_scale(step[g], offset[g], bits); }
};

/// The scale of each element of a period.
struct ElementScales {
  std::vector<float> inverse, offset, low, high;

  ElementScales() = default;
  ElementScales(const Job& job, int64_t period) : inverse(period), offset(period), low(period), high(period) {
    for (int64_t i = 0; i < period; ++i) {
      const GroupScale s = job.scale(i / job.layout.inner % job.layout.groups);
      inverse[i] = s.inverse, offset[i] = s.offset, low[i] = s.low, high[i] = s.high;
    }
  }
};

/// kLanes codes, as quantize_value makes them.
template <bool stochastic>
inline void quantize_lanes(const float* x, const uint16_t* h, const GroupScale& s, float top, uint8_t* q) {
  FloatLanes u = FloatLanes{} + 0.5f;
  if constexpr (stochastic) u = __builtin_convertvector(load_halves(h), FloatLanes) * 0x1p-16f + 0x1p-17f;  // exact: see dither_value
  FloatLanes v = fused(load_lanes<FloatLanes>(x) - s.offset, FloatLanes{} + s.inverse, u);
  v = smaller(larger(v, FloatLanes{}), FloatLanes{} + top);
  store_bytes(__builtin_convertvector(v, IntLanes), q);
}

template <bool stochastic>
inline void quantize_run(const float* __restrict x, const uint16_t* __restrict h, int64_t n, const GroupScale& s, float top,
                         uint8_t* __restrict q) {
  int64_t i = 0;
  if (n >= kLanes) {
    for (; i + kLanes <= n; i += kLanes) quantize_lanes<stochastic>(x + i, h + i, s, top, q + i);
    if (i < n) quantize_lanes<stochastic>(x + n - kLanes, h + n - kLanes, s, top, q + n - kLanes);  // some a second time
    return;
  }
  for (; i < n; ++i) q[i] = quantize_value(x[i] - s.offset, s.inverse, stochastic ? dither_value(h[i]) : 0.5f, top);
}

/// The same by tables, from their element `at` on; returns how many elements lie outside the range (infinities among them).
template <bool stochastic>
inline int32_t quantize_elements(const float* __restrict x, const uint16_t* __restrict h, int64_t n, const ElementScales& s, int64_t at,
                                 float top, uint8_t* __restrict q) {
  const float *__restrict inverse = s.inverse.data() + at, *__restrict offset = s.offset.data() + at;
  const float *__restrict low = s.low.data() + at, *__restrict high = s.high.data() + at;
  int32_t saturated = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float d = x[i] - offset[i];
    saturated += (d < low[i]) | (d > high[i]);
    q[i] = quantize_value(d, inverse[i], stochastic ? dither_value(h[i]) : 0.5f, top);
  }
  return saturated;
}

/// Packs elements begin..end-1 (begin a multiple of 8) and has them noted.
template <bool stochastic, class Watch>
void quantize_chunk(const Rows& rows, const Job& job, const ElementScales& elements, int64_t begin, int64_t end, Watch& watch) {
  alignas(64) float buffer[kPiece];
  alignas(64) uint16_t h[kPiece];
  alignas(64) CodeBuffer unpacked;
  static_assert(kPiece % kDitherCall == 0);
  const float top = top_code(job.bits);
  for (int64_t from = begin; from < end; from += kPiece) {
    const int64_t n = std::min(kPiece, end - from);
    uint8_t* const packed = job.codes + from * job.bits / 8;
    uint8_t* const q = job.bits == 8 ? packed : unpacked.byte;
    const float* x = rows.load(from, n, buffer);
    if constexpr (stochastic) dither(static_cast<uint64_t>(from) / 8, n, job.key, h);
    for_runs(watch.walk, from, n, [&](int64_t g, int64_t within, int64_t first, int64_t count) {
      const GroupScale scale = Watch::kByElement ? GroupScale{} : job.scale(g);
      if constexpr (Watch::kWatches) watch.template note<true>(g, within, x + first, count, scale);
      if constexpr (Watch::kByElement) {
        const int64_t saturated = quantize_elements<stochastic>(x + first, h + first, count, elements, within, top, q + first);
        if constexpr (Watch::kWatches) watch.counted += saturated;
      } else {
        quantize_run<stochastic>(x + first, h + first, count, scale, top, q + first);
      }
    });
    if (job.bits != 8) pack_codes(unpacked, n, job.bits, packed);
  }
}

/// All n elements, in parallel.
template <class Watch>
void quantize_all(const Rows& rows, const Job& job, int64_t n, bool stochastic, Watch& watch) {
  const int64_t chunk = is_short_groups(job.layout) ? whole_groups(job.layout, kChunk) : kChunk, chunks = (n + chunk - 1) / chunk;
  const ElementScales elements = Watch::kByElement ? ElementScales(job, watch.walk.inner) : ElementScales();
#pragma omp parallel if (chunks > 1)
  {
    Watch mine = watch;
#pragma omp for schedule(static)
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t begin = c * chunk, end = std::min(n, begin + chunk);
      if (stochastic) quantize_chunk<true>(rows, job, elements, begin, end, mine);
      else quantize_chunk<false>(rows, job, elements, begin, end, mine);
    }
#pragma omp critical(mesa_codec_quantize)
    watch.merge(mine);
  }
}

void quantize_unwatched(const Rows& rows, const Job& job, int64_t n, bool stochastic) {
  if (is_elementwise(job.layout)) {
    NoWatch<true> watch(job.layout);
    quantize_all(rows, job, n, stochastic, watch);
  } else {
    NoWatch<false> watch(job.layout);
    quantize_all(rows, job, n, stochastic, watch);
  }
}

OddCounts quantize_watched(const Rows& rows, const Job& job, int64_t n, bool stochastic, std::vector<Extremes>& found) {
  OddCounts seen;
  with_watch(job.layout, found.data(), [&](auto& watch) {
    quantize_all(rows, job, n, stochastic, watch);
    seen.saturated = watch.saturated();
  });
  if (all_finite(found)) return seen;
  seen.saturated = 0;
  seen.nonfinite = careful_scan(rows, job.layout, n, found, [&](int64_t g, float x) {
    const GroupScale s = job.scale(g);
    seen.saturated += is_saturated(x - s.offset, s);
  });
  return seen;
}

/// Step and offset of the consecutive groups that make up elements begin..end-1; returns how many of these are not finite.
int64_t scale_groups(const Rows& rows, const Job& job, int64_t begin, int64_t end) {
  alignas(64) float buffer[kPiece];
  int64_t nonfinite = 0;
  Extremes group;
  for (int64_t from = begin; from < end; from += kPiece) {
    const int64_t n = std::min(kPiece, end - from);
    const float* x = rows.load(from, n, buffer);
    for_runs(job.layout, from, n, [&](int64_t g, int64_t within, int64_t first, int64_t count) {
      Extremes run = extremes(x + first, count);
      if (!run.all_finite()) [[unlikely]] run = finite_extremes(x + first, count, nonfinite);
      group.add(run);
      if (within + count < job.layout.inner && from + first + count < end) return;  // goes on in the next piece
      job.offset[g] = group.lo();
      job.step[g] = step_of_range(group.lo(), group.hi(), job.bits);
      group = {};
    });
  }
  return nonfinite;
}

/// Blocks of whole groups, each read for its ranges and again, from the cache, for its codes.
int64_t quantize_blocks(const Rows& rows, const Job& job, int64_t n, bool stochastic) {
  const int64_t block = whole_groups(job.layout, kPiece), blocks = (n + block - 1) / block;
  int64_t nonfinite = 0;
#pragma omp parallel for schedule(static) if (n > kChunk) reduction(+ : nonfinite)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = b * block, end = std::min(n, begin + block);
    NoWatch<false> watch(job.layout);
    nonfinite += scale_groups(rows, job, begin, end);
    if (stochastic) quantize_chunk<true>(rows, job, {}, begin, end, watch);
    else quantize_chunk<false>(rows, job, {}, begin, end, watch);
  }
  return nonfinite;
}

}  // namespace

void quantize(const Tensor& x, GroupLayout layout, int bits, bool stochastic, RandomKey key, const Tensor& step, const Tensor& offset,
              const Tensor& codes, const Tensor& lo, const Tensor& hi, const Tensor& counts) {
  check_layout(x, layout);
  const int64_t n = x.numel();
  const Job job{layout, bits, key, per_group(step, layout), per_group(offset, layout), code_bytes(codes, n, bits)};
  float* const low = lo.defined() ? per_group(lo, layout) : nullptr;
  float* const high = hi.defined() ? per_group(hi, layout) : nullptr;
  const Rows rows(x);
  if (!low && !high && !counts.defined()) {
    if (n > 0) quantize_unwatched(rows, job, n, stochastic);
    return;
  }
  std::vector<Extremes> found(layout.groups);
  add_counts(counts, n > 0 ? quantize_watched(rows, job, n, stochastic, found) : OddCounts{});
  for (int64_t g = 0; g < layout.groups; ++g) {
    if (low) low[g] = found[g].lo();
    if (high) high[g] = found[g].hi();
  }
}

void quantize_current(const Tensor& x, GroupLayout layout, int bits, bool stochastic, RandomKey key, const Tensor& step,
                      const Tensor& offset, const Tensor& codes, const Tensor& counts) {
  check_layout(x, layout);
  const int64_t n = x.numel();
  const Job job{layout, bits, key, per_group(step, layout), per_group(offset, layout), code_bytes(codes, n, bits)};
  if (n == 0) return;
  if (is_short_groups(layout)) {
    add_counts(counts, {0, quantize_blocks(Rows(x), job, n, stochastic)});
  } else {
    group_range(x, layout, offset, step, counts);  // step holds the maxima until it is known
    for (int64_t g = 0; g < layout.groups; ++g) job.step[g] = step_of_range(job.offset[g], job.step[g], bits);
    quantize_unwatched(Rows(x), job, n, stochastic);
  }
}

}  // namespace mesa::kernels::MESA_ISA
