#include "mesa/kernels/matmul.h"

#include <algorithm>

#include "mesa/kernels/elementwise.h"
#include "onednn.h"

namespace mesa::kernels {

namespace cuda {
// kernels/cuda/cublaslt.cpp; null in a build without CUDA.
/// As matmul; arguments are checked already.
[[gnu::weak]] void product(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& bias, const Tensor& addend);
/// dw <- (dw +) dy^T x and db <- sum of dy's rows in one product; false if the library has no such product for these operands.
[[gnu::weak]] bool product_and_row_sums(const Tensor& dy, const Tensor& x, const Tensor& dw, bool accumulate, const Tensor& db);
/// As in matmul.h.
[[gnu::weak]] void tune_products(bool on, const std::map<std::string, std::string>& choices);
[[gnu::weak]] std::map<std::string, std::string> product_choices();
[[gnu::weak]] std::string product_library();
}  // namespace cuda

namespace {

void check_operands(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& bias, const Tensor& addend) {
  bool fits = a.rank() >= 2 && a.rank() == b.rank() && a.rank() == c.rank() && a.dim(-1) == b.dim(-2) && a.dim(-2) == c.dim(-2) &&
              b.dim(-1) == c.dim(-1);
  for (int i = 0; fits && i < a.rank() - 2; ++i) fits = a.dim(i) == b.dim(i) && a.dim(i) == c.dim(i);
  check(fits, "cannot multiply ", a.shape(), " by ", b.shape(), " into ", c.shape());
  check(a.dtype() == b.dtype() && (c.dtype() == a.dtype() || (a.dtype() == DType::bf16 && c.dtype() == DType::f32)),
        "no matrix product of ", to_string(a.dtype()), " and ", to_string(b.dtype()), " into ", to_string(c.dtype()));
  check(!bias.defined() || (bias.rank() == 1 && bias.dim(0) == c.dim(-1) && bias.is_contiguous()), "a bias of shape ", bias.shape(),
        " does not fit the product's last extent ", c.dim(-1));
  const DType wide = c.dtype() == DType::f64 ? DType::f64 : DType::f32;
  const bool copied = bias.defined() && is_gpu(c.device()) && bias.dtype() == DType::bf16 && c.dtype() == DType::bf16;
  check(!bias.defined() || copied || bias.dtype() == wide, "a bias of ", to_string(bias.dtype()), " in a product that adds in ",
        to_string(wide));
  check(!addend.defined() || (addend.shape() == c.shape() && addend.dtype() == c.dtype() && addend.strides() == c.strides()), "cannot add ",
        addend.shape(), " ", to_string(addend.dtype()), " to a product of shape ", c.shape(), " in ", to_string(c.dtype()));
}

/// One product of strided matrices in double: for gradient checks, where right matters and fast does not.
void plain(const double* a, const double* b, double* c, const double* bias, bool accumulate, const Tensor& ta, const Tensor& tb,
           const Tensor& tc) {
  const int64_t m = tc.dim(-2), n = tc.dim(-1), k = ta.dim(-1);
#pragma omp parallel for if (m * n * k > 100000)
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = bias ? bias[j] : 0;
      for (int64_t l = 0; l < k; ++l)
        sum += a[i * ta.strides()[-2] + l * ta.strides()[-1]] * b[l * tb.strides()[-2] + j * tb.strides()[-1]];
      double& out = c[i * tc.strides()[-2] + j * tc.strides()[-1]];
      out = accumulate ? out + sum : sum;
    }
}

int64_t batch_offset(const Tensor& t, int64_t index) {
  int64_t offset = 0;
  for (int axis = t.rank() - 3; axis >= 0; --axis) {
    offset += index % t.dim(axis) * t.strides()[axis];
    index /= t.dim(axis);
  }
  return offset;
}

void matmul_f64(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& bias, bool accumulate) {
  const int64_t batches = c.numel() / std::max<int64_t>(1, c.dim(-1) * c.dim(-2));
  for (int64_t i = 0; i < batches; ++i)
    plain(a.data<double>() + batch_offset(a, i), b.data<double>() + batch_offset(b, i), c.data<double>() + batch_offset(c, i),
          bias.defined() ? bias.data<double>() : nullptr, accumulate, a, b, c);
}

/// An inner extent of 0: oneDNN does not define it.
void sum_of_nothing(const Tensor& c, const Tensor& bias, bool accumulate) {
  check(c.is_contiguous(), "a product over no elements needs a contiguous result");
  if (!accumulate) fill(c, 0);
  if (bias.defined()) add_rows(c, bias, c);
}

/// bf16 where the CPU has no such products, or slow ones: widen, multiply, round.
void matmul_widened(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& bias, bool accumulate) {
  const Tensor wide_a = empty_like(a, DType::f32), wide_b = empty_like(b, DType::f32);
  copy(a, wide_a);
  copy(b, wide_b);
  if (c.dtype() == DType::f32) return onednn::matmul(wide_a, wide_b, c, bias, accumulate);
  const Tensor wide_c = empty_like(c, DType::f32);
  if (accumulate) copy(c, wide_c);
  onednn::matmul(wide_a, wide_b, wide_c, bias, accumulate);
  copy(wide_c, c);
}

/// oneDNN reads a transposed fp32 right-hand side about a quarter slower than a plain one (measured on AVX-512), so a weight that many rows
/// will meet is transposed first.
constexpr int64_t kRowsWorthTransposing = 512;

Tensor plain_right(const Tensor& a, const Tensor& b) {
  if (b.rank() != 2 || b.dtype() != DType::f32 || b.strides()[-1] == 1 || a.dim(0) < kRowsWorthTransposing) return b;
  const Tensor out = empty_like(b);
  copy(b, out);
  return out;
}

}  // namespace

void matmul(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& bias, const Tensor& addend) {
  check_operands(a, b, c, bias, addend);
  if (c.is_meta() || c.numel() == 0) return;
  const bool accumulate = addend.defined();
  if (c.device().kind == DeviceKind::cuda && a.dim(-1) > 0) return cuda::product(a, b, c, bias, addend);
  if (accumulate && addend.raw() != c.raw()) copy(addend, c);
  if (a.dim(-1) == 0) return sum_of_nothing(c, bias, accumulate);
  if (c.dtype() == DType::f64) return matmul_f64(a, b, c, bias, accumulate);
  if (a.dtype() == DType::bf16 && !onednn::fast_bf16()) return matmul_widened(a, b, c, bias, accumulate);
  onednn::matmul(a, plain_right(a, b), c, bias, accumulate);
}

void matmul_weight_grad(const Tensor& dy, const Tensor& x, const Tensor& dw, bool accumulate_w, const Tensor& db, bool accumulate_b) {
  const bool gpu = dw.device().kind == DeviceKind::cuda;
  if (gpu && db.defined()) {  // the sums ride with the product, whose epilogue does not accumulate
    const Tensor sums = accumulate_b ? empty_like(db) : db;
    if (cuda::product_and_row_sums(dy, x, dw, accumulate_w, sums)) {
      if (accumulate_b) add(db, sums, db);
      return;
    }
  }
  matmul(dy.transpose(0, 1), x, dw, {}, accumulate_w ? dw : Tensor());
  if (db.defined()) sum_rows(dy, db, accumulate_b);
}

void tune_products(bool on, const std::map<std::string, std::string>& choices) {
  if (cuda::tune_products) cuda::tune_products(on, choices);
}
std::map<std::string, std::string> product_choices() {
  return cuda::product_choices ? cuda::product_choices() : std::map<std::string, std::string>();
}
std::string product_library() { return cuda::product_library ? cuda::product_library() : std::string(); }

bool native_bf16() {
  static const bool native = onednn::has_bf16();
  return native;
}

std::string matmul_backend() { return onednn::version(); }

}  // namespace mesa::kernels
