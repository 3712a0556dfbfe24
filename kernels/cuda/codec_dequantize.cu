// Decoding: y = fma(q, step[g], offset[g]).
#include "codec.cuh"

namespace mesa::kernels::cuda {
namespace {

/// Units that a thread decodes, all of whose codes are under way before the first is used.
inline constexpr int kAtOnce = 4;

/// Units of y, which is contiguous.
template <class Y>
struct Decoded {
  Y* data;
  uint32_t count, whole;
  int rest;
};

template <int bits, class Y>
__device__ inline uint64_t load_codes(const uint8_t* codes, const Decoded<Y>& y, uint32_t u) {
  if (u < y.whole) return __ldcs(reinterpret_cast<const CodeWord<bits>*>(codes) + u);
  uint64_t word = 0;
#pragma unroll 1
  for (int i = 0; i < y.rest * bits; i += 8) word |= uint64_t{codes[int64_t{u} * bits + i / 8]} << i;
  return word;
}

/// A unit's G steps or offsets.
template <int G>
__device__ inline void load_scales(const float* from, float (&to)[G]) {
  if constexpr (G == 1) {
    to[0] = *from;
  } else {
#pragma unroll
    for (int i = 0; i < G; i += 4) {
      const Pack<float, 4> four = *reinterpret_cast<const Pack<float, 4>*>(from + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) to[i + j] = four.v[j];
    }
  }
}

template <class Y>
__device__ inline void store_unit(Y* to, const float (&v)[kUnit]) {
  constexpr int kStep = 16 / sizeof(Y);
#pragma unroll
  for (int from = 0; from < kUnit; from += kStep) {
    float part[kStep];
#pragma unroll
    for (int i = 0; i < kStep; ++i) part[i] = v[from + i];
    store_pack(to + from, part);
  }
}

template <class Y, int G, int bits>
__global__ void dequantize_units_kernel(const uint8_t* __restrict__ codes, Decoded<Y> y, UnitGroups groups, const float* __restrict__ step,
                                        const float* __restrict__ offset) {
  const uint32_t first = blockIdx.x * blockDim.x * kAtOnce + threadIdx.x;
  uint64_t words[kAtOnce];
#pragma unroll
  for (int k = 0; k < kAtOnce; ++k)
    if (const uint32_t u = first + k * blockDim.x; u < y.count) words[k] = load_codes<bits>(codes, y, u);
  uint32_t group = ~0u;
  float steps[G]{}, offsets[G]{};
#pragma unroll
  for (int k = 0; k < kAtOnce; ++k) {
    const uint32_t u = first + k * blockDim.x;
    if (u >= y.count) break;
    if (const uint32_t g = groups.of(u); g != group) {
      group = g;
      load_scales(step + int64_t{g} * G, steps);
      load_scales(offset + int64_t{g} * G, offsets);
    }
    float v[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const uint8_t q = static_cast<uint8_t>(words[k] >> i * bits & ((1u << bits) - 1));
      v[i] = dequantize_value(q, steps[i % G], offsets[i % G]);
    }
    Y* const to = y.data + int64_t{u} * kUnit;
    if (u < y.whole) {
      store_unit(to, v);
    } else {
#pragma unroll
      for (int i = 0; i < kUnit; ++i)
        if (i < y.rest) store(to + i, v[i]);
    }
  }
}

/// Any layout and dtype, element by element.
template <class Y>
__global__ void dequantize_elements_kernel(const uint8_t* codes, int bits, GroupLayout layout, const float* step, const float* offset, Y* y,
                                           int64_t n) {
  for (int64_t e = global_index(); e < n; e += global_stride()) {
    const int64_t g = e / layout.inner % layout.groups, bit = e * bits;
    const uint8_t q = static_cast<uint8_t>(codes[bit / 8] >> bit % 8 & ((1 << bits) - 1));
    store(y + e, dequantize_value(q, step[g], offset[g]));
  }
}

}  // namespace

void dequantize(const Tensor& codes, GroupLayout layout, int bits, const Tensor& step, const Tensor& offset, const Tensor& y) {
  check_layout(y, layout);
  check(y.is_contiguous(), "decoding writes contiguous tensors");
  const uint8_t* const bytes = code_bytes(codes, y.numel(), bits);
  const float *const steps = per_group(step, layout), *const offsets = per_group(offset, layout);
  const int64_t n = y.numel();
  if (n == 0) return;
  int G = has_units(y) && aligned(bytes, static_cast<size_t>(bits)) ? unit_groups(layout, n) : 0;
  if (G > 1 && !(aligned(steps, 16) && aligned(offsets, 16))) G = 0;
  if (G == 0) {
    const auto run = [&](auto tag) {
      launch("dequantize", &dequantize_elements_kernel<decltype(tag)>, grid_for(n, 256), 256, 0, bytes, bits, layout, steps, offsets,
             y.data<decltype(tag)>(), n);
    };
    if (y.dtype() == DType::f64)
      run(double{});
    else
      dispatch_narrow(y.dtype(), run);
    return;
  }
  dispatch_bits(bits, [&](auto width) {
    dispatch_units(y.dtype(), G, [&](auto tag, auto each) {
      using Y = decltype(tag);
      constexpr int kBits = decltype(width)::value, kEach = decltype(each)::value;
      const Decoded<Y> units{y.data<Y>(), static_cast<uint32_t>(ceil_div(n, kUnit)), static_cast<uint32_t>(n / kUnit),
                             static_cast<int>(n % kUnit)};
      launch("dequantize", &dequantize_units_kernel<Y, kEach, kBits>, static_cast<unsigned>(ceil_div(units.count, 256 * kAtOnce)), 256, 0,
             bytes, units, UnitGroups(layout, kEach), steps, offsets);
    });
  });
}

}  // namespace mesa::kernels::cuda
