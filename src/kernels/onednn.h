// The only door to oneDNN: matrix products and convolutions, primitives cached per shape.
#pragma once
#include "mesa/kernels/conv.h"

namespace mesa::kernels::onednn {

/// c <- a b (+ c) (+ bias) for f32, or bf16 inputs with bf16 or f32 output; see mesa/kernels/matmul.h.
void matmul(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& bias, bool accumulate);
/// Convolutions of f32, or of bf16 where fast_bf16(); see mesa/kernels/conv.h. Weights are f32 or of x's dtype, bias and dw f32.
void conv(const Tensor& x, const Tensor& w, const Tensor& bias, const Tensor& y, const ConvGeometry& geometry);
void conv_data_grad(const Tensor& dy, const Tensor& w, const Tensor& dx, const ConvGeometry& geometry);
void conv_weight_grad(const Tensor& dy, const Tensor& x, const Tensor& dw, bool accumulate, const ConvGeometry& geometry);
bool has_bf16();
/// False too where bf16 products are slower than fp32's: on Intel's cores without AMX vdpbf16ps has half of the FMA's rate
/// (Emerald Rapids: 84 against 167 GFLOP/s a core, measured).
bool fast_bf16();
std::string version();

}  // namespace mesa::kernels::onednn
