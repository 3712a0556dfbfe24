// The only door to oneDNN: one matrix product, primitives cached per shape.
#pragma once
#include "mesa/tensor/tensor.h"

namespace mesa::kernels::onednn {

/// c <- a b (+ c) (+ bias) for f32, or bf16 inputs with bf16 or f32 output; see mesa/kernels/matmul.h.
void matmul(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& bias, bool accumulate);
bool has_bf16();
/// False too where bf16 products are slower than fp32's: on Intel's cores without AMX vdpbf16ps has half of the FMA's rate
/// (Emerald Rapids: 84 against 167 GFLOP/s a core, measured).
bool fast_bf16();
std::string version();

}  // namespace mesa::kernels::onednn
