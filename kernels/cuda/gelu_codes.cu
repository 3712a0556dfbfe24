// y = gelu(x), with codes of x from the same visit.
#include "codec_pass.cuh"
#include "codec_producer.cuh"
#include "mesa/kernels/elementwise.h"

namespace mesa::kernels::cuda {
namespace {

template <class T>
__global__ void gelu_codes_kernel(Units<T> x, T* y, Blocks blocks, UnitGroups groups, Producer to) {
  const uint32_t end = blocks.end(x.count);
  uint32_t u = blocks.begin() + threadIdx.x;
  const uint32_t group = groups.of(min(u, x.count - 1));
  const GroupScale scale = to.scale_of(group);
  Noted noted;
  uint32_t saturated = 0, nonfinite = 0;
  to.watch.begin();
  for (; u < end; u += blocks.step) {
    float v[kUnit], out[kUnit];
    const Unit<T> now = Units<T>::load(x.at(u));
#pragma unroll
    for (int i = 0; i < kUnit; ++i) v[i] = now[i], out[i] = scalar::gelu(now[i]);
    store_unit(y, u, out, kUnit);
    noted.add(v, scale, saturated, nonfinite);
    to.write(u, v, scale);
  }
  Seen<1> seen;
  seen.lo[0] = noted.lo, seen.hi[0] = noted.hi;
  put_ranges(to.watch, group, seen);
  to.watch.finish(saturated, nonfinite);
}

}  // namespace

void gelu_codes(const Tensor& x, const Tensor& y, const RunningCodes& of_x) {
  check_alike(x, y, "gelu");
  check_layout(x, of_x.layout);
  const int64_t n = x.numel();
  const bool units = x.dtype() == y.dtype() && has_units(x) && aligned(y.raw(), 16) && n % kUnit == 0 && n > 0 &&
                     can_produce(of_x, n, width_of(x), kUnit) && unit_groups(of_x.layout, n) == 1;
  const Blocks blocks = units ? share_units(x, of_x.layout, 1) : Blocks{};
  if (blocks.across == 0) {
    gelu(x, y);
    return quantize_running(x, of_x);
  }
  const WatchedGroups groups(of_x);
  dispatch_narrow(x.dtype(), [&](auto tag) {
    using T = decltype(tag);
    const Units<T> from = units_of<T>(x);
    launch("gelu_codes", &gelu_codes_kernel<T>, dim3(blocks.rows(from.count), blocks.columns), blocks.threads, groups.watch.shared_bytes(),
           from, y.data<T>(), blocks, UnitGroups(of_x.layout, 1), producer_of(of_x, n, groups));
  });
}

}  // namespace mesa::kernels::cuda
