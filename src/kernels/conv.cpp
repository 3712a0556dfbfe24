// Which engine computes a convolution: a matrix product where a window is one token, oneDNN, cuDNN, or products over unfolded windows.
#include "mesa/kernels/conv.h"

#include <algorithm>
#include <atomic>

#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/matmul.h"
#include "onednn.h"

namespace mesa::kernels {

namespace cuda {
// kernels/cuda/cudnn_conv.cpp; null in a build without cuDNN. Weights and their gradient are [O, kh, kw, I / groups] there, in x's dtype.
// False where cuDNN has no deterministic engine for the convolution; arguments are checked already.
[[gnu::weak]] bool cudnn_conv(const Tensor& x, const Tensor& w, const Tensor& y, const ConvGeometry& geometry);
[[gnu::weak]] bool cudnn_conv_data_grad(const Tensor& dy, const Tensor& w, const Tensor& dx, const ConvGeometry& geometry);
[[gnu::weak]] bool cudnn_conv_weight_grad(const Tensor& dy, const Tensor& x, const Tensor& dw, const ConvGeometry& geometry);
[[gnu::weak]] std::vector<std::string> cudnn_slow_convolutions();
}  // namespace cuda

void ConvGeometry::validate() const {
  check(height > 0 && width > 0 && kernel_height > 0 && kernel_width > 0 && stride > 0 && padding >= 0 && dilation > 0 && groups > 0,
        "a convolution of a grid ", height, " x ", width, " with a kernel of ", kernel_height, " x ", kernel_width, ", stride ", stride,
        ", padding ", padding, ", dilation ", dilation, " and ", groups, " groups");
  check(out_height() > 0 && out_width() > 0, "a kernel of ", kernel_height, " x ", kernel_width, " with dilation ", dilation,
        " does not fit a grid of ", height, " x ", width, " with padding ", padding);
}

namespace {

void check_operands(const Tensor& x, const Tensor& w, const Tensor& y, const ConvGeometry& g) {
  g.validate();
  check(x.rank() == 3 && y.rank() == 3 && w.rank() == 4 && x.is_contiguous() && y.is_contiguous() && w.is_contiguous() &&
            x.dim(0) == y.dim(0) && x.dim(1) == g.height * g.width && y.dim(1) == g.out_height() * g.out_width(),
        "conv2d: grids ", x.shape(), " and ", y.shape(), " for ", g.height, " x ", g.width, " and ", g.out_height(), " x ", g.out_width());
  check(x.dim(2) % g.groups == 0 && y.dim(2) % g.groups == 0 &&
            w.shape() == Shape({y.dim(2), x.dim(2) / g.groups, g.kernel_height, g.kernel_width}),
        "conv2d: a weight ", w.shape(), " for ", x.dim(2), " to ", y.dim(2), " channels in ", g.groups, " groups");
  check(x.dtype() == y.dtype() && w.dtype() == (x.dtype() == DType::f64 ? DType::f64 : DType::f32), "conv2d of ", to_string(x.dtype()),
        " to ", to_string(y.dtype()), " with a weight of ", to_string(w.dtype()));
}

/// [O, I, kh, kw] as [O, kh, kw, I], a view.
Tensor channels_last(const Tensor& w) { return w.transpose(1, 2).transpose(2, 3); }

Tensor channels_last(const Tensor& w, DType dtype) {
  const Tensor view = channels_last(w), out = Tensor::empty(view.shape(), dtype, w.device());
  copy(view, out);
  return out;
}

Tensor as_matrix(const Tensor& grid) { return grid.reshape({grid.dim(0) * grid.dim(1), grid.dim(2)}); }

/// dw <- (dw +) a gradient [O, kh, kw, I].
void put_weight_grad(const Tensor& gradient, const Tensor& dw, bool accumulate) {
  const Tensor term = accumulate ? empty_like(dw) : dw;
  copy(gradient, channels_last(term));
  if (accumulate) add(dw, term, dw);
}

// --- products over unfolded windows: f64, and what the library of a GPU does not have ------------------------------------------------

constexpr int64_t kUnfoldedBytes = int64_t{64} << 20;  // scratch; more images than fit are done in several turns

/// f(first, count) for runs of images whose unfolded windows fit the scratch.
template <class F>
void for_images(int64_t batch, int64_t bytes_each, const F& f) {
  const int64_t most = std::max<int64_t>(1, kUnfoldedBytes / std::max<int64_t>(1, bytes_each));
  for (int64_t first = 0; first < batch; first += most) f(first, std::min(most, batch - first));
}

/// The operands as a product for each group: columns [g, M, K], weight [g, O / g, K], y [g, M, O / g].
struct Unfolded {
  const ConvGeometry& g;
  int64_t I, O, places;
  DType dtype;
  Device device;

  Unfolded(const Tensor& x, const Tensor& y, const ConvGeometry& g)
      : g(g), I(x.dim(2)), O(y.dim(2)), places(y.dim(1)), dtype(x.dtype()), device(x.device()) {}
  int64_t inner() const { return g.taps() * I / g.groups; }
  int64_t bytes_each() const { return g.groups * places * inner() * size_of(dtype); }
  Tensor columns(int64_t images) const { return Tensor::empty({g.groups, images * places, inner()}, dtype, device); }
  Tensor weight(const Tensor& w) const { return channels_last(w, dtype).reshape({g.groups, O / g.groups, inner()}); }
  /// Images of a grid of results.
  Tensor results(const Tensor& y, int64_t first, int64_t count) const {
    return y.as_strided({g.groups, count * places, O / g.groups}, {O / g.groups, O, 1}, y.offset() + first * places * O);
  }
};

void unfolded_conv(const Tensor& x, const Tensor& w, const Tensor& y, const ConvGeometry& g) {
  const Unfolded by(x, y, g);
  const Tensor weight = by.weight(w);
  for_images(x.dim(0), by.bytes_each(), [&](int64_t first, int64_t count) {
    const Tensor columns = by.columns(count);
    unfold(x.narrow(0, first, count), g, columns);
    matmul(columns, weight.transpose(1, 2), by.results(y, first, count));
  });
}

void unfolded_data_grad(const Tensor& dy, const Tensor& w, const Tensor& dx, const ConvGeometry& g) {
  const Unfolded by(dx, dy, g);
  const Tensor weight = by.weight(w);
  for_images(dx.dim(0), by.bytes_each(), [&](int64_t first, int64_t count) {
    const Tensor columns = by.columns(count);
    matmul(by.results(dy, first, count), weight, columns);
    fold(columns, g, dx.narrow(0, first, count));
  });
}

void unfolded_weight_grad(const Tensor& dy, const Tensor& x, const Tensor& dw, bool accumulate, const ConvGeometry& g) {
  const Unfolded by(x, dy, g);
  const Tensor sum = Tensor::empty({g.groups, by.O / g.groups, by.inner()}, dw.dtype(), dw.device());
  for_images(x.dim(0), by.bytes_each(), [&](int64_t first, int64_t count) {
    const Tensor columns = by.columns(count);
    unfold(x.narrow(0, first, count), g, columns);
    matmul(by.results(dy, first, count).transpose(1, 2), columns, sum, {}, first > 0 ? sum : Tensor());
  });
  put_weight_grad(sum.reshape(channels_last(dw).shape()), dw, accumulate);
}

// --- oneDNN --------------------------------------------------------------------------------------------------------------------------

bool on_cpu_by_library(const Tensor& x) { return x.device() == kCpu && x.dtype() != DType::f64; }
bool is_meta_without_scratch(const Tensor& x) { return x.is_meta() && x.dtype() != DType::f64; }

/// bf16 where the CPU has no such products, or slow ones, is widened.
Tensor as_computed(const Tensor& x) {
  if (x.dtype() != DType::bf16 || onednn::fast_bf16()) return x;
  const Tensor wide = empty_like(x, DType::f32);
  copy(x, wide);
  return wide;
}
/// The weight as it enters a product with tensors of this dtype: rounded to bf16 for bf16, whatever it is computed in.
Tensor weight_as_computed(const Tensor& w, DType dtype) {
  if (dtype == w.dtype()) return w;
  const Tensor rounded = empty_like(w, dtype);
  copy(w, rounded);
  return as_computed(rounded);
}
/// f(result) with a result of the dtype that is computed in.
template <class F>
void computed_into(const Tensor& y, const F& f) {
  if (y.dtype() != DType::bf16 || onednn::fast_bf16()) return f(y);
  const Tensor wide = empty_like(y, DType::f32);
  f(wide);
  copy(wide, y);
}

std::atomic<bool> without_cudnn = false;  // a GPU had a convolution for it, and this build has none

bool by_cudnn(const Tensor& x) {
  if (x.device().kind != DeviceKind::cuda || x.dtype() == DType::f64) return false;
  if (cuda::cudnn_conv == nullptr) without_cudnn = true;
  return cuda::cudnn_conv != nullptr;
}

}  // namespace

void conv2d(const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& y, const ConvGeometry& g) {
  check_operands(x, w, y, g);
  check(!bias.defined() || (bias.shape() == Shape({y.dim(2)}) && bias.dtype() == w.dtype()), "conv2d: a bias ", bias.shape(), " for ",
        y.dim(2), " channels");
  if (y.numel() == 0 || is_meta_without_scratch(x)) return;
  if (g.is_product()) {
    const Tensor weight = w.dtype() == x.dtype() ? w : channels_last(w, x.dtype());
    return matmul(as_matrix(x), weight.reshape({y.dim(2), x.dim(2)}).transpose(0, 1), as_matrix(y), bias);
  }
  if (on_cpu_by_library(x))
    return computed_into(y, [&](const Tensor& to) { onednn::conv(as_computed(x), weight_as_computed(w, x.dtype()), bias, to, g); });
  if (!by_cudnn(x) || !cuda::cudnn_conv(x, channels_last(w, x.dtype()), y, g)) unfolded_conv(x, w, y, g);
  if (bias.defined()) add_rows(y, bias, y);
}

void conv2d_data_grad(const Tensor& dy, const Tensor& w, const Tensor& dx, const ConvGeometry& g) {
  check_operands(dx, w, dy, g);
  if (dx.numel() == 0 || is_meta_without_scratch(dx)) return;
  if (g.is_product()) {
    const Tensor weight = w.dtype() == dx.dtype() ? w : channels_last(w, dx.dtype());
    return matmul(as_matrix(dy), weight.reshape({dy.dim(2), dx.dim(2)}), as_matrix(dx));
  }
  if (on_cpu_by_library(dx))
    return computed_into(dx, [&](const Tensor& to) { onednn::conv_data_grad(as_computed(dy), weight_as_computed(w, dx.dtype()), to, g); });
  if (!by_cudnn(dx) || !cuda::cudnn_conv_data_grad(dy, channels_last(w, dx.dtype()), dx, g)) unfolded_data_grad(dy, w, dx, g);
}

void conv2d_weight_grad(const Tensor& dy, const Tensor& x, const Tensor& dw, bool accumulate, const ConvGeometry& g) {
  check_operands(x, dw, dy, g);
  if (x.numel() == 0) {
    if (!accumulate) fill(dw, 0);
    return;
  }
  if (is_meta_without_scratch(x)) return;
  if (g.is_product())
    return matmul_weight_grad(as_matrix(dy), as_matrix(x), dw.reshape({dy.dim(2), x.dim(2)}), accumulate, Tensor(), false);
  // oneDNN 2.6 leaves what it finds in the gradient of a tap that reads nothing, where operands are bf16.
  if (on_cpu_by_library(x) && g.every_tap_reads()) return onednn::conv_weight_grad(as_computed(dy), as_computed(x), dw, accumulate, g);
  if (by_cudnn(x)) {
    const Tensor gradient = Tensor::empty(channels_last(dw).shape(), x.dtype(), dw.device());
    if (cuda::cudnn_conv_weight_grad(dy, x, gradient, g)) return put_weight_grad(gradient, dw, accumulate);
  }
  unfolded_weight_grad(dy, x, dw, accumulate, g);
}

std::vector<std::string> slow_convolutions() {
  if (without_cudnn) return {"all, since this build has no cuDNN"};
  return cuda::cudnn_slow_convolutions ? cuda::cudnn_slow_convolutions() : std::vector<std::string>();
}

}  // namespace mesa::kernels
