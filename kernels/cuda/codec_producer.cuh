// How a kernel that computes a tensor writes its codes in the same pass (see Coding). Bits and rounding are known at run time only:
// such a kernel is large, and is compiled once instead of six times.
#pragma once
#include "codec_watch.cuh"

namespace mesa::kernels::cuda {
namespace {

/// x - offset, rounded: where x was just computed, the compiler must not make one instruction of both.
__device__ inline float distance_of(float x, const GroupScale& scale) { return __fsub_rn(x, scale.offset); }

/// Codes on their way: where they go, what they are made with, and what is noted meanwhile.
struct Producer {
  Scales scales{};
  Dither dither{RandomKey{}};
  Divider inner{};  ///< elements of a row's group; only of several groups
  int bits = 8;
  bool stochastic = false;
  uint8_t* codes = nullptr;  ///< null: nothing is to be coded
  Watch watch{};

  __device__ uint32_t group_at(uint32_t column) const { return watch.groups == 1 ? 0 : inner.quotient(column); }
  __device__ GroupScale scale_of(uint32_t group) const { return scales.of(group, bits); }

  template <int V, int n_bits>
  __device__ void store(int64_t piece, const float (&v)[V]) const {
    if constexpr (V * n_bits >= 8) {
      using Word = Bits<V * n_bits>;
      __stcs(reinterpret_cast<Word*>(codes) + piece, static_cast<Word>(pack_codes<n_bits>(v)));
    }
  }
  /// The codes of elements V piece .. V piece + V - 1 (logical order), all in one group.
  template <int V>
  __device__ void write(int64_t piece, const float (&x)[V], const GroupScale& scale) const {
    constexpr int kPieces = kUnit / V;  // of a unit
    float v[V];
    if (stochastic) {
      const Philox4 random = dither.words(static_cast<uint32_t>(piece / kPieces));
      const int part = static_cast<int>(piece % kPieces);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        uint32_t word = random.word[i / 2];
#pragma unroll
        for (int p = 1; p < kPieces; ++p)  // no index that the compiler does not know: the words must stay in registers
          if (part == p) word = random.word[(p * V + i) / 2];
        v[i] = std::fma(distance_of(x[i], scale), scale.inverse, dither.value(word, i % 2));
      }
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] = std::fma(distance_of(x[i], scale), scale.inverse, 0.5f);
    }
    if (bits == 8)
      store<V, 8>(piece, v);
    else if (bits == 4)
      store<V, 4>(piece, v);
    else
      store<V, 2>(piece, v);
  }
};

/// What is noted of the pieces of one group.
struct Noted {
  float lo = kEmptyLo, hi = kEmptyHi;

  template <int V>
  __device__ void add(const float (&x)[V], const GroupScale& scale, uint32_t& saturated, uint32_t& nonfinite) {
    float least = x[0], greatest = x[0];
#pragma unroll
    for (int i = 1; i < V; ++i) least = minimum(least, x[i]), greatest = maximum(greatest, x[i]);
    if (least >= -FLT_MAX && greatest <= FLT_MAX && !(distance_of(least, scale) < scale.low) &&
        !(distance_of(greatest, scale) > scale.high)) {
      lo = minimum(lo, least), hi = maximum(hi, greatest);
      return;
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (!is_finite(x[i])) {
        ++nonfinite;
        continue;
      }
      lo = minimum(lo, x[i]), hi = maximum(hi, x[i]);
      saturated += is_saturated(distance_of(x[i], scale), scale);
    }
  }
};

// --- on the host --------------------------------------------------------------------------------------------------------------------

/// True if the codes of pieces of V elements are whole bytes and may be written by themselves.
inline bool can_write(const Coding& into, int64_t n, int V) {
  return n % kUnit == 0 && V * into.bits % 8 == 0 && n / kUnit < int64_t{1} << 31 && aligned(into.codes.raw(), 8);
}
/// The same by estimates: a group lies in one place of each row of `width`.
inline bool can_produce(const Coding& into, int64_t n, int64_t width, int V) {
  const GroupLayout& layout = into.layout;
  const bool in_rows = layout.groups == 1 || (!layout.consecutive && layout.groups * layout.inner == width && layout.inner % kUnit == 0);
  return into.is_running() && in_rows && width % kUnit == 0 && layout.groups <= Watch::kShared && can_write(into, n, V);
}

/// Without scales: each group's own.
inline Producer producer_of(const Coding& into, int64_t n) {
  Producer out;
  out.dither = Dither(into.key);
  out.bits = into.bits;
  out.stochastic = into.stochastic;
  out.codes = code_bytes(into.codes, n, into.bits);
  return out;
}
/// By estimates. `groups` must live until the kernel is launched.
inline Producer producer_of(const Coding& into, int64_t n, const WatchedGroups& groups) {
  Producer out = producer_of(into, n);
  const Estimates& now = groups.watch.estimates;
  out.scales = {now.alpha, now.beta, now.top};
  out.inner = Divider(into.layout.inner);
  out.watch = groups.watch;
  return out;
}

}  // namespace
}  // namespace mesa::kernels::cuda
