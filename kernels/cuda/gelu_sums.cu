// dx = dy gelu'(x), perhaps y = gelu(x), and the sums of dx's columns from the same visit: the gradient of the bias in front of gelu.
// A thread keeps its columns and, in registers, their sums over its rows; those of all threads are rows of `sums`, still to be added up.
#include "codec_decode.cuh"
#include "mesa/kernels/elementwise.h"

namespace mesa::kernels::cuda {
namespace {

constexpr int kThreads = 256, kResident = 4;  // of a block; blocks that a multiprocessor is to hold at once

/// x as values,
template <class T>
struct ValueUnits {
  using Type = T;
  using Held = Unit<T>;
  const T* x;
  __device__ Held read(uint32_t u) const { return Units<T>::load(x + int64_t{u} * kUnit); }
  __device__ static void values(const Held& held, float (&v)[kUnit]) { held.values(v); }
};
/// or as codes.
template <class T, int bits>
struct CodedUnits {
  using Type = T;
  struct Held {
    CodeWord<bits> word;
    float step[1], offset[1];
  };
  const uint8_t* codes;
  UnitGroups groups;
  const float *step, *offset;
  __device__ Held read(uint32_t u) const {
    const uint32_t group = groups.of(u);
    return {__ldcs(reinterpret_cast<const CodeWord<bits>*>(codes) + u), {__ldg(step + group)}, {__ldg(offset + group)}};
  }
  __device__ static void values(const Held& held, float (&v)[kUnit]) { decode_unit<T, bits>(held.word, held.step, held.offset, v); }
};

/// How threads share out the units of rows: those of thread (x, y) stand in one column of units, in every parts-th row.
struct Columns {
  uint32_t rows, across, parts;  ///< across: units in a row
};

/// dx may be dy.
template <bool with_y, class Source, class T>
__global__ void __launch_bounds__(kThreads, kResident) gelu_grad_sums_kernel(Source x, Columns all, const T* dy, T* dx, T* y, float* sums) {
  constexpr int kAtOnce = 4 / sizeof(T);  // rows, whose loads are under way before the first store
  const uint32_t column = blockIdx.y * blockDim.x + threadIdx.x, part = blockIdx.x * blockDim.y + threadIdx.y;
  if (column >= all.across || part >= all.parts) return;
  float sum[kUnit] = {};
  for (uint32_t first = part; first < all.rows; first += kAtOnce * all.parts) {
    typename Source::Held held[kAtOnce];
    Unit<T> gradient[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
      if (const uint32_t row = first + k * all.parts; row < all.rows) {
        held[k] = x.read(row * all.across + column);
        gradient[k] = Units<T>::load(dy + (int64_t{row} * all.across + column) * kUnit);
      }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const uint32_t row = first + k * all.parts;
      if (row >= all.rows) break;
      const uint32_t u = row * all.across + column;
      float v[kUnit], d[kUnit];
      Source::values(held[k], v);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        d[i] = rounded_to<T>(gradient[k][i] * scalar::gelu_slope(v[i]));
        sum[i] += d[i];
        if constexpr (with_y) v[i] = scalar::gelu(v[i]);
      }
      store_unit(dx, u, d, kUnit);
      if constexpr (with_y) store_unit(y, u, v, kUnit);
    }
  }
  store_unit(sums, part * all.across + column, sum, kUnit);
}

/// True if a kernel has rows of such tensors: all of dx's dtype, and in whole units.
bool has_columns(const Tensor& dy, const Tensor& dx, const Tensor& y, const Tensor& sums) {
  const auto fits = [&](const Tensor& t) { return !t.defined() || (t.dtype() == dx.dtype() && aligned(t.raw(), 16)); };
  return dx.dtype() != DType::f64 && width_of(dx) % kUnit == 0 && ceil_div(dx.numel(), kUnit) < int64_t{1} << 31 && fits(dy) && fits(dx) &&
         fits(y) && aligned(sums.raw(), 16);
}

template <class Source>
void launch_columns(const char* name, const Source& x, const Tensor& dy, const Tensor& dx, const Tensor& y, const Tensor& sums) {
  using T = typename Source::Type;
  const auto u32 = [](int64_t n) { return static_cast<uint32_t>(n); };
  const Columns all{u32(dx.rows()), u32(width_of(dx) / kUnit), u32(sums.dim(0))};
  const ColumnBlocks block(width_of(dx));
  launch(name, y.defined() ? &gelu_grad_sums_kernel<true, Source, T> : &gelu_grad_sums_kernel<false, Source, T>,
         dim3(u32(ceil_div(all.parts, block.high)), u32(block.tiles)), dim3(u32(block.wide), u32(block.high)), 0, x, all, dy.data<T>(),
         dx.data<T>(), y.defined() ? y.data<T>() : nullptr, sums.data<float>());
}

void check_sums(const Tensor& dx, const Tensor& sums) {
  check_flat(sums, "gelu_grad: sums");
  check(sums.rank() == 2 && sums.dim(0) > 0 && sums.dim(1) == width_of(dx) && sums.dtype() == DType::f32, "gelu_grad: sums of shape ",
        sums.shape(), " ", to_string(sums.dtype()), " for a gradient of shape ", dx.shape());
}

/// By a pass of its own.
void sum_apart(const Tensor& dx, const Tensor& sums) {
  fill(sums, 0);
  sum_rows(dx, sums.select(0, 0), false);
}

}  // namespace

void gelu_grad_sums(const Tensor& dy, const Tensor& x, const Tensor& dx, const Tensor& y, const Tensor& sums) {
  check_alike(dy, x, "gelu_grad");
  check_alike(dy, dx, "gelu_grad");
  if (y.defined()) check_alike(dy, y, "gelu_grad");
  check_sums(dx, sums);
  if (dx.numel() > 0 && x.dtype() == dx.dtype() && aligned(x.raw(), 16) && has_columns(dy, dx, y, sums))
    return dispatch_narrow(dx.dtype(), [&](auto tag) {
      using T = decltype(tag);
      launch_columns("gelu_grad", ValueUnits<T>{x.data<T>()}, dy, dx, y, sums);
    });
  gelu_grad(dy, x, dx, y);
  sum_apart(dx, sums);
}

void gelu_grad_coded_sums(const Tensor& dy, const Coded& x, const Tensor& dx, const Tensor& y, const Tensor& sums) {
  check_alike(dy, dx, "gelu_grad");
  if (y.defined()) check_alike(dy, y, "gelu_grad");
  check_layout(dx, x.layout);
  check_sums(dx, sums);
  const uint8_t* const codes = code_bytes(x.codes, dx.numel(), x.bits);
  if (dx.numel() > 0 && unit_groups(x.layout, dx.numel()) == 1 && aligned(codes, static_cast<size_t>(x.bits)) &&
      has_columns(dy, dx, y, sums))
    return dispatch_narrow(dx.dtype(), [&](auto tag) {
      dispatch_bits(x.bits, [&](auto width) {
        const CodedUnits<decltype(tag), decltype(width)::value> from{codes, UnitGroups(x.layout, 1), per_group(x.step, x.layout),
                                                                     per_group(x.offset, x.layout)};
        launch_columns("gelu_grad_coded", from, dy, dx, y, sums);
      });
    });
  gelu_grad_coded(dy, x, dx, y);
  sum_apart(dx, sums);
}

}  // namespace mesa::kernels::cuda
