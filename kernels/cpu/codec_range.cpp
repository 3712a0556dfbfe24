// Ranges of groups: lo[g] = min, hi[g] = max over the finite elements of group g.
#include "codec_extremes.h"

namespace mesa::kernels::MESA_ISA {

void group_range(const Tensor& x, GroupLayout layout, const Tensor& lo, const Tensor& hi, const Tensor& counts) {
  check_layout(x, layout);
  float *const low = per_group(lo, layout), *const high = per_group(hi, layout);
  const int64_t n = x.numel();
  const Rows rows(x);
  std::vector<Extremes> found(layout.groups);
  if (n > 0) {
    with_watch(layout, found.data(), [&](auto& watch) {
      const int64_t chunk = is_short_groups(layout) ? whole_groups(layout, kChunk) : kChunk, chunks = (n + chunk - 1) / chunk;
#pragma omp parallel if (chunks > 1)
      {
        auto mine = watch;
        alignas(64) float buffer[kPiece];
#pragma omp for schedule(static)
        for (int64_t c = 0; c < chunks; ++c) {
          const int64_t end = std::min(n, (c + 1) * chunk);
          for (int64_t from = c * chunk; from < end; from += kPiece) {
            const int64_t count = std::min(kPiece, end - from);
            const float* piece = rows.load(from, count, buffer);
            for_runs(mine.walk, from, count, [&](int64_t g, int64_t within, int64_t first, int64_t run) {
              mine.template note<false>(g, within, piece + first, run, {});
            });
          }
        }
#pragma omp critical(mesa_codec_range)
        watch.merge(mine);
      }
    });
    if (!all_finite(found)) {
      add_counts(counts, {0, careful_scan(rows, layout, n, found, [](int64_t, float) {})});
    }
  }
  for (int64_t g = 0; g < layout.groups; ++g) {
    low[g] = found[g].lo();
    high[g] = found[g].hi();
  }
}

}  // namespace mesa::kernels::MESA_ISA
