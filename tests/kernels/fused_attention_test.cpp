// The fused attention kernels against the same maths in double, over lengths, heads, layouts and codes. They exist on a GPU only.
#include <catch2/catch.hpp>
#include <cmath>

#include "mesa/kernels/attention.h"
#include "mesa/kernels/elementwise.h"
#include "support/gradcheck.h"
#include "support/kernels.h"

using namespace mesa;
using namespace mesa::testing;

namespace {

struct Form {
  int64_t B, N, H, D;
  kernels::Windows windows = {};  ///< of the N tokens, or none
};

/// A packed projection in bf16 on the device with the rest of an attention's operands, and the same numbers in double on the host.
struct Operands {
  Form f;
  double scale;
  Tensor qkv, d_o, o, lse, dqkv;
  Tensor wide_qkv, wide_d_o, wide_o, wide_lse, wide_dqkv;
  kernels::WindowBias windows, wide_windows;

  Operands(const Form& form, double spread) : f(form), scale(1 / std::sqrt(static_cast<double>(form.D))) {
    const int64_t C = f.H * f.D;
    const Tensor x = random({f.B, f.N, 3 * C}, DType::bf16, "qkv", spread), g = random({f.B, f.N, C}, DType::bf16, "d_o");
    qkv = to(x, kCuda), d_o = to(g, kCuda);
    o = empty_like(d_o), dqkv = empty_like(qkv);
    const bool windowed = f.windows.defined();
    const Shape rows = windowed ? Shape{f.B * f.windows.count(), f.H, f.windows.length()} : Shape{f.B, f.H, f.N};
    lse = Tensor::empty(rows, DType::f32, kCuda);
    if (windowed) {
      const Tensor table = random({f.windows.distances(), f.H}, DType::f32, "table", spread);
      windows = {f.windows, to(table, kCuda), Tensor::empty(table.shape(), DType::f32, kCuda), false};
      wide_windows = {f.windows, widened(table), Tensor::empty(table.shape(), DType::f64), false};
    }
    wide_qkv = Tensor::empty(x.shape(), DType::f64), wide_d_o = Tensor::empty(g.shape(), DType::f64);
    kernels::copy(widened(x), wide_qkv), kernels::copy(widened(g), wide_d_o);
    wide_o = empty_like(wide_d_o), wide_dqkv = empty_like(wide_qkv);
    wide_lse = Tensor::empty(rows, DType::f64);
  }
  static Tensor widened(const Tensor& x) { return Tensor::from(x.shape(), x.to_vector<double>()); }
  Tensor third(const Tensor& t, int i) const { return t.narrow(-1, i * f.H * f.D, f.H * f.D); }

  void forward() {
    kernels::fused_attention(third(qkv, 0), third(qkv, 1), third(qkv, 2), f.H, scale, o, lse, kernels::QkvCodes{}, windows);
    kernels::attention(third(wide_qkv, 0), third(wide_qkv, 1), third(wide_qkv, 2), f.H, scale, wide_o, wide_lse,
                       kernels::AttentionBy::engine, {}, wide_windows);
  }
  void wide_backward(bool exact) {
    kernels::attention_grad(wide_d_o, {third(wide_qkv, 0), {}}, {third(wide_qkv, 1), {}}, {third(wide_qkv, 2), {}},
                            exact ? wide_o : Tensor(), exact ? wide_lse : Tensor(), f.H, scale, third(wide_dqkv, 0), third(wide_dqkv, 1),
                            third(wide_dqkv, 2), kernels::AttentionBy::engine, wide_windows);
  }
};

kernels::AttentionOperand values_of(const Tensor& x) { return {x, {}}; }

void backward(const Operands& x, bool exact) {
  kernels::fused_attention_grad(x.d_o, values_of(x.third(x.qkv, 0)), values_of(x.third(x.qkv, 1)), values_of(x.third(x.qkv, 2)),
                                exact ? x.o : Tensor(), exact ? x.lse : Tensor(), x.f.H, x.scale, x.third(x.dqkv, 0), x.third(x.dqkv, 1),
                                x.third(x.dqkv, 2), x.windows);
}

void check_gradient(const Operands& x) {
  const Numbers got = x.dqkv.to_vector<double>(), want = x.wide_dqkv.to_vector<double>();
  CHECK(relative_error(got, want) <= 1e-2);
  CHECK(largest_difference(got, want) <= 0.03 * std::max(1e-3, largest(want)));
  // Of a single window and head little is summed, and it cancels.
  if (x.windows.defined()) CHECK(relative_error(x.windows.d_table.to_vector<double>(), x.wide_windows.d_table.to_vector<double>()) <= 2e-2);
}

/// Swin's first and last grid, a window larger than a chunk of keys, windows narrower than high with padding, one token each, and more
/// windows than the gradient of biases has parts.
Form windowed(int64_t B, int64_t H, kernels::Windows w) { return {B, w.tokens(), H, 32, w}; }
const Form kWindowForms[] = {windowed(2, 2, {14, 21, 7, 7, 3, 3, 14, 21}),   windowed(3, 1, {7, 7, 7, 7, 0, 0, 7, 7}),
                             windowed(1, 2, {12, 24, 12, 12, 0, 6, 12, 24}), windowed(1, 1, {6, 6, 3, 2, 1, 1, 5, 4}),
                             windowed(1, 1, {2, 2, 1, 1, 0, 0, 2, 2}),       windowed(1, 16, {24, 24, 2, 2, 1, 1, 24, 24}),
                             windowed(1, 1, {20, 40, 20, 20, 0, 7, 20, 40})};

const Form kForms[] = {{2, 1, 1, 64},  {1, 2, 3, 32},  {2, 15, 1, 32}, {1, 16, 2, 64},  {3, 17, 2, 32}, {1, 49, 3, 32},
                       {1, 63, 1, 64}, {1, 64, 1, 32}, {1, 65, 2, 64}, {2, 197, 3, 64}, {1, 257, 1, 32}};

std::vector<Form> all_forms() {
  std::vector<Form> all(std::begin(kForms), std::end(kForms));
  all.insert(all.end(), std::begin(kWindowForms), std::end(kWindowForms));
  return all;
}

}  // namespace

TEST_CASE("fused attention: output and log-sum-exp are those of the definition", "[kernels][fused]") {
  if (test_device() != kCuda) return;
  for (const Form& f : all_forms())
    for (const double spread : {1.0, 6.0}) {
      CAPTURE(f.B, f.N, f.H, f.D, spread);
      Operands x(f, spread);
      x.forward();
      CHECK(relative_error(x.o.to_vector<double>(), x.wide_o.to_vector<double>()) <= 1e-2);
      CHECK(largest_difference(x.lse.to_vector<double>(), x.wide_lse.to_vector<double>()) <=
            1e-4 * std::max(1.0, largest(x.wide_lse.to_vector<double>())));
    }
}

TEST_CASE("fused attention: gradients, from exact storage and with rows normalized again", "[kernels][fused]") {
  if (test_device() != kCuda) return;
  for (const Form& f : all_forms())
    for (const bool exact : {true, false}) {
      CAPTURE(f.B, f.N, f.H, f.D, exact);
      Operands x(f, 1.5);
      x.forward();
      x.wide_backward(exact);
      backward(x, exact);
      check_gradient(x);
      const Tensor once = empty_like(x.dqkv);
      transfer(x.dqkv, once);
      const std::vector<float> table = f.windows.defined() ? x.windows.d_table.to_vector<float>() : std::vector<float>();
      backward(x, exact);
      CHECK(x.dqkv.to_vector<float>() == once.to_vector<float>());  // the same bits again
      if (f.windows.defined()) CHECK(x.windows.d_table.to_vector<float>() == table);
    }
}

TEST_CASE("fused attention: codes are decoded as dequantize decodes them", "[kernels][fused]") {
  if (test_device() != kCuda) return;
  for (const Form& f : {Form{2, 17, 2, 32}, Form{1, 65, 1, 64}, Form{2, 50, 3, 64}, kWindowForms[0]})
    for (const int bits : {8, 4, 2})
      for (const bool consecutive : {true, false}) {
        CAPTURE(f.B, f.N, f.H, f.D, bits, consecutive);
        Operands x(f, 1.5);
        const int64_t C = f.H * f.D, n = f.B * f.N * C;
        const kernels::GroupLayout layout =
            consecutive ? kernels::GroupLayout{1, (n + 255) / 256, 256, true} : kernels::GroupLayout{f.B * f.N, f.H, f.D, false};
        kernels::AttentionOperand coded[3], decoded[3];
        for (int i = 0; i < 3; ++i) {
          const Tensor codes = Tensor::empty({(n * bits + 7) / 8}, DType::u8, kCuda),
                       step = Tensor::empty({layout.groups}, DType::f32, kCuda);
          const Tensor offset = empty_like(step), values = Tensor::empty({f.B, f.N, C}, DType::bf16, kCuda);
          kernels::quantize_current(x.third(x.qkv, i), layout, bits, true, RandomKey{1, 2}, step, offset, codes, Tensor());
          kernels::dequantize(codes, layout, bits, step, offset, values);
          coded[i] = {{}, {codes, step, offset, layout, bits}};
          decoded[i] = {values, {}};
        }
        const auto gradient = [&](const kernels::AttentionOperand* operands) {
          kernels::fused_attention_grad(x.d_o, operands[0], operands[1], operands[2], Tensor(), Tensor(), f.H, x.scale, x.third(x.dqkv, 0),
                                        x.third(x.dqkv, 1), x.third(x.dqkv, 2), x.windows);
          std::vector<float> all = x.dqkv.to_vector<float>();
          if (!f.windows.defined()) return all;
          const std::vector<float> table = x.windows.d_table.to_vector<float>();
          all.insert(all.end(), table.begin(), table.end());
          return all;
        };
        CHECK(gradient(coded) == gradient(decoded));
        const kernels::AttentionOperand mixed[] = {coded[0], decoded[1], coded[2]};
        CHECK(gradient(mixed) == gradient(decoded));
      }
}
