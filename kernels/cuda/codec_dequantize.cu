// Decoding, x = fma(q, step[g], offset[g]), and what backward computes of x in the same visit: gelu, its gradient, gamma x + beta. A
// decoded x is rounded to the dtype that it was packed from, as if it had been kept there.
#include "codec_decode.cuh"
#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/norm.h"

namespace mesa::kernels::cuda {
namespace {

/// Units that a thread decodes, all of whose codes are under way before the first is used.
inline constexpr int kAtOnce = 4;

// What becomes of the unit u of x, of which `valid` elements exist. `read` fetches what that takes besides: for all units of a thread
// before the first is used, since no load can go ahead of a store that might change what it finds.

struct ReadsNothing {
  __device__ int read(uint32_t) const { return 0; }
};
template <class Y>
struct Keep : ReadsNothing {
  Y* y;
  explicit Keep(Y* y) : y(y) {}
  __device__ void operator()(uint32_t u, const float (&x)[kUnit], int, int valid) const { store_unit(y, u, x, valid); }
};
template <class Y>
struct Gelu : ReadsNothing {
  Y* y;
  explicit Gelu(Y* y) : y(y) {}
  __device__ void operator()(uint32_t u, const float (&x)[kUnit], int, int valid) const {
    float v[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) v[i] = scalar::gelu(x[i]);
    store_unit(y, u, v, valid);
  }
};
/// dx may be dy.
template <class Y>
struct GeluGrad {
  Units<Y> dy;
  Y* dx;
  Gelu<Y> value;  // y null: not wanted
  __device__ Unit<Y> read(uint32_t u) const { return dy.load(u); }
  __device__ void operator()(uint32_t u, const float (&x)[kUnit], const Unit<Y>& g, int valid) const {
    float v[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) v[i] = g[i] * scalar::gelu_slope(x[i]);
    store_unit(dx, u, v, valid);
    if (value.y) value(u, x, 0, valid);
  }
};
template <class Y>
struct Affine : ReadsNothing {
  const float *gamma, *beta;
  Y* y;
  Divider row;  ///< units in a row of parameters
  Affine(const float* gamma, const float* beta, Y* y, Divider row) : gamma(gamma), beta(beta), y(y), row(row) {}
  __device__ void operator()(uint32_t u, const float (&x)[kUnit], int, int valid) const {
    const Unit<float> g = Units<float>::load(gamma + int64_t{row.remainder(u)} * kUnit),
                      b = Units<float>::load(beta + int64_t{row.remainder(u)} * kUnit);
    float v[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) v[i] = std::fma(g[i], x[i], b[i]);
    store_unit(y, u, v, valid);
  }
};

template <class T, int G, int bits, class Then>
__global__ void decode_units_kernel(const uint8_t* __restrict__ codes, Extent extent, UnitGroups groups, const float* __restrict__ step,
                                    const float* __restrict__ offset, Then then) {
  const uint32_t first = blockIdx.x * blockDim.x * kAtOnce + threadIdx.x;
  uint64_t words[kAtOnce];
  decltype(then.read(0)) others[kAtOnce];
#pragma unroll
  for (int k = 0; k < kAtOnce; ++k)
    if (const uint32_t u = first + k * blockDim.x; u < extent.count) {
      words[k] = load_codes<bits>(codes, extent, u);
      others[k] = then.read(u);
    }
  uint32_t group = ~0u;
  float steps[G]{}, offsets[G]{};
#pragma unroll
  for (int k = 0; k < kAtOnce; ++k) {
    const uint32_t u = first + k * blockDim.x;
    if (u >= extent.count) break;
    if (const uint32_t g = groups.of(u); g != group) {
      group = g;
      load_scales(step + int64_t{g} * G, steps);
      load_scales(offset + int64_t{g} * G, offsets);
    }
    float v[kUnit];
    decode_unit<T, bits>(words[k], steps, offsets, v);
    then(u, v, others[k], u < extent.whole ? kUnit : extent.rest);
  }
}

/// Hands units of n decoded elements to then_for(tag of the dtype). False if codes or layout have no such units.
template <class ThenFor>
bool decode_units(const char* name, const Coded& x, DType dtype, int64_t n, const ThenFor& then_for) {
  const uint8_t* const bytes = code_bytes(x.codes, n, x.bits);
  const float *const steps = per_group(x.step, x.layout), *const offsets = per_group(x.offset, x.layout);
  const int G = dtype != DType::f64 && aligned(bytes, static_cast<size_t>(x.bits)) ? unit_groups(x.layout, n) : 0;
  if (G == 0 || (G > 1 && !(aligned(steps, 16) && aligned(offsets, 16)))) return false;
  const Extent extent{static_cast<uint32_t>(ceil_div(n, kUnit)), static_cast<uint32_t>(n / kUnit), static_cast<int>(n % kUnit)};
  dispatch_bits(x.bits, [&](auto width) {
    dispatch_units(dtype, G, [&](auto tag, auto each) {
      using T = decltype(tag);
      constexpr int kBits = decltype(width)::value, kEach = decltype(each)::value;
      const auto then = then_for(tag);
      launch(name, &decode_units_kernel<T, kEach, kBits, std::decay_t<decltype(then)>>,
             static_cast<unsigned>(ceil_div(extent.count, 256 * kAtOnce)), 256, 0, bytes, extent, UnitGroups(x.layout, kEach), steps,
             offsets, then);
    });
  });
  return true;
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
  const int64_t n = y.numel();
  if (n == 0) return;
  const auto keep = [&](auto tag) { return Keep<decltype(tag)>(y.data<decltype(tag)>()); };
  if (aligned(y.raw(), 16) && decode_units("dequantize", {codes, step, offset, layout, bits}, y.dtype(), n, keep)) return;
  const uint8_t* const bytes = code_bytes(codes, n, bits);
  const float *const steps = per_group(step, layout), *const offsets = per_group(offset, layout);
  const auto run = [&](auto tag) {
    launch("dequantize", &dequantize_elements_kernel<decltype(tag)>, grid_for(n, 256), 256, 0, bytes, bits, layout, steps, offsets,
           y.data<decltype(tag)>(), n);
  };
  if (y.dtype() == DType::f64)
    run(double{});
  else
    dispatch_narrow(y.dtype(), run);
}

void gelu_coded(const Coded& x, const Tensor& y) {
  check(y.is_contiguous(), "gelu writes contiguous tensors");
  if (y.numel() == 0) return;
  const auto value = [&](auto tag) { return Gelu<decltype(tag)>(y.data<decltype(tag)>()); };
  if (aligned(y.raw(), 16) && decode_units("gelu_coded", x, y.dtype(), y.numel(), value)) return;
  gelu(decoded(x, y), y);
}

void gelu_grad_coded(const Tensor& dy, const Coded& x, const Tensor& dx, const Tensor& y) {
  check_alike(dy, dx, "gelu_grad");
  if (y.defined()) check_alike(dy, y, "gelu_grad");
  const int64_t n = dx.numel();
  if (n == 0) return;
  const auto gradient = [&](auto tag) {
    using T = decltype(tag);
    return GeluGrad<T>{units_of<T>(dy), dx.data<T>(), Gelu<T>(y.defined() ? y.data<T>() : nullptr)};
  };
  const bool alike = dy.dtype() == dx.dtype() && (!y.defined() || (y.dtype() == dx.dtype() && aligned(y.raw(), 16)));
  if (alike && aligned(dy.raw(), 16) && aligned(dx.raw(), 16) && decode_units("gelu_grad_coded", x, dx.dtype(), n, gradient)) return;
  gelu_grad(dy, decoded(x, dx), dx, y);
}

void affine_coded(const Coded& xhat, const Tensor& gamma, const Tensor& beta, const Tensor& y) {
  const int64_t n = y.numel(), width = width_of(y);
  check(y.is_contiguous() && gamma.numel() == width && beta.numel() == width, "affine: gamma has ", gamma.numel(), " and beta ",
        beta.numel(), " elements but y is ", y.shape());
  if (n == 0) return;
  const auto affine_of = [&](auto tag) {
    using T = decltype(tag);
    return Affine<T>(gamma.data<float>(), beta.data<float>(), y.data<T>(), Divider(width / kUnit));
  };
  const bool whole =
      width % kUnit == 0 && gamma.dtype() == DType::f32 && aligned(y.raw(), 16) && aligned(gamma.raw(), 16) && aligned(beta.raw(), 16);
  if (whole && decode_units("affine_coded", xhat, y.dtype(), n, affine_of)) return;
  affine(decoded(xhat, y), gamma, beta, y);
}

}  // namespace mesa::kernels::cuda
