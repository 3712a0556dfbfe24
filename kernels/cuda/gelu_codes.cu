// y = gelu(x), with codes of x from the same visit.
#include "codec_groups.cuh"
#include "codec_pass.cuh"
#include "codec_producer.cuh"
#include "mesa/kernels/elementwise.h"

namespace mesa::kernels::cuda {
namespace {

template <class T>
__device__ inline void store_gelu(T* y, uint32_t u, const float (&x)[kUnit]) {
  float out[kUnit];
#pragma unroll
  for (int i = 0; i < kUnit; ++i) out[i] = scalar::gelu(x[i]);
  store_unit(y, u, out, kUnit);
}

/// By running estimates.
template <class T>
__global__ void gelu_running_codes_kernel(Units<T> x, T* y, Blocks blocks, UnitGroups groups, Producer to) {
  const uint32_t end = blocks.end(x.count);
  uint32_t u = blocks.begin() + threadIdx.x;
  const uint32_t group = groups.of(min(u, x.count - 1));
  const GroupScale scale = to.scale_of(group);
  Noted noted;
  uint32_t saturated = 0, nonfinite = 0;
  to.watch.begin();
  for (; u < end; u += blocks.step) {
    float v[kUnit];
    Units<T>::load(x.at(u)).values(v);
    store_gelu(y, u, v);
    noted.add(v, scale, saturated, nonfinite);
    to.write(u, v, scale);
  }
  Seen<1> seen;
  seen.lo[0] = noted.lo, seen.hi[0] = noted.hi;
  put_ranges(to.watch, group, seen);
  to.watch.finish(saturated, nonfinite);
}

/// By the own ranges of short groups.
template <class T>
__global__ void gelu_current_codes_kernel(Units<T> x, T* y, GroupTeams teams, Producer to) {
  const uint32_t group = (blockIdx.x * blockDim.x + threadIdx.x) >> teams.log_lanes;
  const HeldGroup<T, kTeamUnits> held(x, teams, group < teams.groups ? group * teams.units : x.count);
  const GroupScale scale = held.measure(x, teams, group, to.bits);
#pragma unroll
  for (int k = 0; k < kTeamUnits; ++k) {
    if (held.at(k) >= held.end) break;
    float v[kUnit];
    held.unit[k].values(v);
    store_gelu(y, held.at(k), v);
    to.write(held.at(k), v, scale);
  }
}

/// True if it could be done in one pass.
template <class T>
bool running_codes(const Tensor& x, const Tensor& y, const Coding& into) {
  const int64_t n = x.numel();
  if (!can_produce(into, n, width_of(x), kUnit) || unit_groups(into.layout, n) != 1) return false;
  const Blocks blocks = share_units(x, into.layout, 1);
  if (blocks.across == 0) return false;
  const Units<T> from = units_of<T>(x);
  const WatchedGroups groups(into);
  launch("gelu_codes", &gelu_running_codes_kernel<T>, dim3(blocks.rows(from.count), blocks.columns), blocks.threads,
         groups.watch.shared_bytes(), from, y.data<T>(), blocks, UnitGroups(into.layout, 1), producer_of(into, n, groups));
  return true;
}
template <class T>
bool current_codes(const Tensor& x, const Tensor& y, const Coding& into) {
  const int64_t n = x.numel();
  if (!are_short_groups(into.layout, n) || !can_write(into, n, kUnit)) return false;
  const GroupTeams teams = group_teams(into, kTeamUnits);
  launch("gelu_codes", &gelu_current_codes_kernel<T>, teams.blocks(), teams.threads(), 0, units_of<T>(x), y.data<T>(), teams,
         producer_of(into, n));
  return true;
}

}  // namespace

void gelu_codes(const Tensor& x, const Tensor& y, const Coding& of_x) {
  check_alike(x, y, "gelu");
  check_layout(x, of_x.layout);
  bool done = false;
  if (x.numel() > 0 && x.dtype() == y.dtype() && has_units(x) && aligned(y.raw(), 16)) {
    dispatch_narrow(x.dtype(), [&](auto tag) {
      using T = decltype(tag);
      done = of_x.is_running() ? running_codes<T>(x, y, of_x) : current_codes<T>(x, y, of_x);
    });
  }
  if (done) return;
  gelu(x, y);
  encode(x, of_x);
}

}  // namespace mesa::kernels::cuda
