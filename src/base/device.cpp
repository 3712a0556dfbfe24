#include "mesa/base/device.h"

#include <algorithm>
#include <cstdlib>
#include <string>

#include "mesa/base/error.h"

namespace mesa {

const char* to_string(DeviceKind kind) {
  switch (kind) {
    case DeviceKind::cpu: return "cpu";
    case DeviceKind::cuda: return "cuda";
    case DeviceKind::meta: return "meta";
  }
  return "?";
}

const char* to_string(Isa isa) {
  switch (isa) {
    case Isa::plain: return "plain";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
  }
  return "?";
}

namespace {
Isa detect_isa() {
  Isa best = Isa::plain;
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    best = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      best = Isa::avx512;
  }
  const char* wish = std::getenv("MESA_CPU");
  if (wish == nullptr || *wish == 0) return best;
  for (Isa isa : {Isa::plain, Isa::avx2, Isa::avx512})
    if (std::string(wish) == to_string(isa)) return std::min(isa, best);
  fail("MESA_CPU is '", wish, "'; it may be plain, avx2 or avx512");
}
}  // namespace

Isa cpu_isa() {
  static const Isa isa = detect_isa();
  return isa;
}

bool cpu_has_bf16() { return cpu_isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16"); }

}  // namespace mesa
