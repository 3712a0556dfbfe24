// Matrix products through oneDNN (fp32, bf16 with fp32 accumulation), and a plain path for fp64.
#pragma once
#include <map>

#include "mesa/kernels/kernel.h"

namespace mesa::kernels {

/// c <- a b (+ addend) (+ bias). a [.., M, K], b [.., K, N], c [.., M, N] of equal rank 2 to 4 and equal leading extents; any strides with
/// unit stride in one of the last two axes (so a transpose is a view). dtypes: all f64; all f32; a, b bf16 with c bf16 or f32.
/// bias [N] f32 (f64 for f64; on a GPU also bf16 for bf16 c), optional. addend, optional, has c's shape, strides and dtype; it may be c
/// itself.
void matmul(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& bias = {}, const Tensor& addend = {});

/// The gradients of y = x w^T + b in one product: dw [O, I] <- (dw +) dy^T x, and, if db [O] is defined, db <- (db +) sum of dy's rows.
/// dy [M, O], x [M, I] of one dtype, dw and db f32 (f64 for f64). The sum rides along in the product's epilogue where the backend can.
void matmul_weight_grad(const Tensor& dy, const Tensor& x, const Tensor& dw, bool accumulate_w, const Tensor& db, bool accumulate_b);

/// On a GPU the library suggests several algorithms for each form of operands. Its first is taken or, `on`, the fastest: the first call of
/// each form times them on its own operands, some 30 times each, for which the host waits; matmul_weight_grad also in one product with its
/// sums and apart. Which one wins may differ from run
/// to run, and with it the last bits of results; with the `choices` of another process they are the same. Does nothing on a CPU.
void tune_products(bool on, const std::map<std::string, std::string>& choices = {});
/// What was chosen so far, algorithms by forms. Of use to the same library on the same kind of GPU: "cublasLt 130101 on NVIDIA H200, ...".
std::map<std::string, std::string> product_choices();
std::string product_library();

/// True if this CPU multiplies bf16; otherwise, and where that is slower than fp32, products are computed after widening to fp32.
bool native_bf16();
/// "oneDNN 2.6.3", for --version.
std::string matmul_backend();

}  // namespace mesa::kernels
