// The fused attention kernels against the same maths in double, over lengths, heads, layouts and codes. They exist on a GPU only.
#include <algorithm>
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
  int64_t others = 0;             ///< keys of their own, or none: the N tokens are

  int64_t keys() const { return others > 0 ? others : N; }
};

/// q, k and v: thirds of one packed projection or, with other tokens' keys, a tensor and the halves of another.
struct Packed {
  std::vector<Tensor> tensors;
  int64_t width;

  Tensor part(int i) const {
    const int whole = tensors.size() == 1 || i == 0 ? 0 : 1;
    return tensors[static_cast<size_t>(whole)].narrow(-1, (i - whole) * width, width);
  }
  std::vector<double> numbers() const {
    std::vector<double> all;
    for (const Tensor& t : tensors) {
      const std::vector<double> some = t.to_vector<double>();
      all.insert(all.end(), some.begin(), some.end());
    }
    return all;
  }
  Packed like() const {
    Packed out{{}, width};
    for (const Tensor& t : tensors) out.tensors.push_back(empty_like(t));
    return out;
  }
};

/// An attention's operands in bf16 on the device, and the same numbers in double on the host.
struct Operands {
  Form f;
  double scale;
  Packed qkv, dqkv;
  Tensor d_o, o, lse;
  Packed wide_qkv, wide_dqkv;
  Tensor wide_d_o, wide_o, wide_lse;
  kernels::WindowBias windows, wide_windows;

  Operands(const Form& form, double spread) : f(form), scale(1 / std::sqrt(static_cast<double>(form.D))) {
    const int64_t C = f.H * f.D;
    qkv.width = wide_qkv.width = C;
    const auto add = [&](const Shape& shape, const char* name) {
      const Tensor x = random(shape, DType::bf16, name, spread);
      qkv.tensors.push_back(to(x, kCuda)), wide_qkv.tensors.push_back(widened(x));
    };
    if (f.others == 0)
      add({f.B, f.N, 3 * C}, "qkv");
    else
      add({f.B, f.N, C}, "q"), add({f.B, f.others, 2 * C}, "kv");
    dqkv = qkv.like(), wide_dqkv = wide_qkv.like();
    const Tensor g = random({f.B, f.N, C}, DType::bf16, "d_o");
    d_o = to(g, kCuda), wide_d_o = widened(g);
    o = empty_like(d_o), wide_o = empty_like(wide_d_o);
    const bool windowed = f.windows.defined();
    const Shape rows = windowed ? Shape{f.B * f.windows.count(), f.H, f.windows.length()} : Shape{f.B, f.H, f.N};
    lse = Tensor::empty(rows, DType::f32, kCuda), wide_lse = Tensor::empty(rows, DType::f64);
    if (windowed) {
      const Tensor table = random({f.windows.distances(), f.H}, DType::f32, "table", spread);
      windows = {f.windows, to(table, kCuda), Tensor::empty(table.shape(), DType::f32, kCuda), false};
      wide_windows = {f.windows, widened(table), Tensor::empty(table.shape(), DType::f64), false};
    }
  }
  static Tensor widened(const Tensor& x) { return Tensor::from(x.shape(), x.to_vector<double>()); }

  void forward() {
    kernels::fused_attention(qkv.part(0), qkv.part(1), qkv.part(2), f.H, scale, o, lse, kernels::QkvCodes{}, windows);
    kernels::attention(wide_qkv.part(0), wide_qkv.part(1), wide_qkv.part(2), f.H, scale, wide_o, wide_lse, kernels::AttentionBy::engine, {},
                       wide_windows);
  }
  void wide_backward(bool exact) {
    kernels::attention_grad(wide_d_o, {wide_qkv.part(0), {}}, {wide_qkv.part(1), {}}, {wide_qkv.part(2), {}}, exact ? wide_o : Tensor(),
                            exact ? wide_lse : Tensor(), f.H, scale, wide_dqkv.part(0), wide_dqkv.part(1), wide_dqkv.part(2),
                            kernels::AttentionBy::engine, wide_windows);
  }
};

void backward(const Operands& x, const std::array<kernels::AttentionOperand, 3>& from, bool exact, const Tensor& sums = {}) {
  kernels::fused_attention_grad(x.d_o, from[0], from[1], from[2], exact ? x.o : Tensor(), exact ? x.lse : Tensor(), x.f.H, x.scale,
                                x.dqkv.part(0), x.dqkv.part(1), x.dqkv.part(2), x.windows, sums);
}
void backward(const Operands& x, bool exact, const Tensor& sums = {}) {
  backward(x, {{{x.qkv.part(0), {}}, {x.qkv.part(1), {}}, {x.qkv.part(2), {}}}}, exact, sums);
}

void check_gradient(const Operands& x) {
  const Numbers got = x.dqkv.numbers(), want = x.wide_dqkv.numbers();
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
/// Many queries of few keys, met by blocks in turns, as in PVT's first stages; its last stage; a last chunk of one query; fewer queries
/// than keys, and of these more than a block's shared memory holds.
const Form kLongForms[] = {
    {1, 1040, 1, 64, {}, 49}, {2, 50, 8, 64, {}, 50}, {2, 1025, 1, 32, {}, 16}, {2, 17, 2, 32, {}, 150}, {1, 18, 1, 32, {}, 1100}};

std::vector<Form> all_forms() {
  std::vector<Form> all(std::begin(kForms), std::end(kForms));
  all.insert(all.end(), std::begin(kWindowForms), std::end(kWindowForms));
  all.insert(all.end(), std::begin(kLongForms), std::end(kLongForms));
  return all;
}

}  // namespace

TEST_CASE("fused attention: output and log-sum-exp are those of the definition", "[kernels][fused]") {
  if (test_device() != kCuda) return;
  for (const Form& f : all_forms())
    for (const double spread : {1.0, 6.0}) {
      CAPTURE(f.B, f.N, f.keys(), f.H, f.D, spread);
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
      CAPTURE(f.B, f.N, f.keys(), f.H, f.D, exact);
      Operands x(f, 1.5);
      x.forward();
      x.wide_backward(exact);
      backward(x, exact);
      check_gradient(x);
      const Numbers once = x.dqkv.numbers();
      const std::vector<float> table = f.windows.defined() ? x.windows.d_table.to_vector<float>() : std::vector<float>();
      backward(x, exact);
      CHECK(x.dqkv.numbers() == once);  // the same bits again
      if (f.windows.defined()) CHECK(x.windows.d_table.to_vector<float>() == table);
    }
}

TEST_CASE("fused attention: the gradient's columns are summed in the same pass", "[kernels][fused]") {
  if (test_device() != kCuda) return;
  constexpr auto by = kernels::AttentionBy::engine;
  const auto parts_of = [](const Form& f) {
    return kernels::attention_grad_parts(Tensor::empty({f.B, f.N, f.H * f.D}, DType::bf16, kCuda), f.H, by, f.windows);
  };
  for (const Form& f : {Form{2, 1, 1, 64}, Form{1, 2, 3, 32}, Form{3, 17, 2, 32}, Form{1, 65, 2, 64}, Form{1, 197, 2, 64}, kWindowForms[0],
                        kWindowForms[3], kWindowForms[4]})
    for (const bool exact : {true, false}) {
      CAPTURE(f.B, f.N, f.H, f.D, exact);
      Operands x(f, 1.5);
      x.forward();
      backward(x, exact);
      const Numbers alone = x.dqkv.numbers();
      const int64_t width = 3 * f.H * f.D;
      const Tensor sums = Tensor::empty({parts_of(f), width}, DType::f32, kCuda), again = empty_like(sums);
      kernels::fill(sums, std::nan("")), kernels::fill(x.dqkv.tensors[0], 0);
      backward(x, exact, sums);
      CHECK(x.dqkv.numbers() == alone);
      backward(x, exact, again);
      CHECK(again.to_vector<float>() == sums.to_vector<float>());
      Numbers got(width), want(width), terms(width);
      const Numbers rows = sums.to_vector<double>();
      for (size_t i = 0; i < rows.size(); ++i) got[i % width] += rows[i];
      for (size_t i = 0; i < alone.size(); ++i) want[i % width] += alone[i], terms[i % width] += std::fabs(alone[i]);
      for (int64_t c = 0; c < width; ++c) REQUIRE(std::fabs(got[c] - want[c]) <= 1e-6 * terms[c]);  // a NaN fails
    }
  CHECK(parts_of({2, 197, 3, 64}) == 4);
  CHECK(parts_of({1, 961, 1, 64}) == 0);  // blocks may share the queries of a key
  CHECK(kernels::attention_grad_parts(Tensor::empty({1, 8, 64}, DType::bf16, kCuda), 1, kernels::AttentionBy::cudnn, {}) == 0);
  CHECK(kernels::attention_grad_parts(Tensor::empty({1, 8, 64}, DType::f32, kCuda), 1, by, {}) == 0);
  const Operands other({1, 16, 1, 32, {}, 150}, 1);
  CHECK_THROWS_WITH(backward(other, false, Tensor::empty({1, 96}, DType::f32, kCuda)), Catch::Contains("16 queries and 150 keys"));
  const Operands few({1, 16, 1, 32}, 1);
  CHECK_THROWS_WITH(backward(few, false, Tensor::empty({2, 96}, DType::f32, kCuda)), Catch::Contains("sums of [2, 96], not [1, 96]"));
}

TEST_CASE("fused attention: codes are decoded as dequantize decodes them", "[kernels][fused]") {
  if (test_device() != kCuda) return;
  for (const Form& f : {Form{2, 17, 2, 32}, Form{1, 65, 1, 64}, Form{2, 50, 3, 64}, Form{2, 1025, 1, 32, {}, 16}, kWindowForms[0]})
    for (const int bits : {8, 4, 2})
      for (const bool consecutive : {true, false}) {
        CAPTURE(f.B, f.N, f.keys(), f.H, f.D, bits, consecutive);
        Operands x(f, 1.5);
        std::array<kernels::AttentionOperand, 3> coded, decoded;
        for (int i = 0; i < 3; ++i) {
          const Tensor exact = x.qkv.part(i);
          const int64_t n = exact.numel();
          const kernels::GroupLayout layout =
              consecutive ? kernels::GroupLayout{1, (n + 255) / 256, 256, true} : kernels::GroupLayout{exact.rows(), f.H, f.D, false};
          const Tensor codes = Tensor::empty({(n * bits + 7) / 8}, DType::u8, kCuda),
                       step = Tensor::empty({layout.groups}, DType::f32, kCuda);
          const Tensor offset = empty_like(step), values = Tensor::empty(exact.shape(), DType::bf16, kCuda);
          kernels::quantize_current(exact, layout, bits, true, RandomKey{1, 2}, step, offset, codes, Tensor());
          kernels::dequantize(codes, layout, bits, step, offset, values);
          coded[i] = {{}, {codes, step, offset, layout, bits}};
          decoded[i] = {values, {}};
        }
        const auto gradient = [&](const std::array<kernels::AttentionOperand, 3>& operands) {
          backward(x, operands, false);
          Numbers all = x.dqkv.numbers();
          if (!f.windows.defined()) return all;
          const Numbers table = x.windows.d_table.to_vector<double>();
          all.insert(all.end(), table.begin(), table.end());
          return all;
        };
        CHECK(gradient(coded) == gradient(decoded));
        CHECK(gradient({coded[0], decoded[1], coded[2]}) == gradient(decoded));
      }
}

TEST_CASE("fused attention: keys that no query attends to get no gradient", "[kernels][fused]") {
  if (test_device() != kCuda) return;
  const Tensor none = Tensor::empty({2, 0, 64}, DType::bf16, kCuda), lse = Tensor::empty({2, 1, 0}, DType::f32, kCuda);
  const Tensor kv = to(random({2, 5, 128}, DType::bf16, "kv"), kCuda), dkv = empty_like(kv);
  kernels::fill(dkv, 1);
  const kernels::AttentionOperand q{none, {}}, k{kv.narrow(-1, 0, 64), {}}, v{kv.narrow(-1, 64, 64), {}};
  kernels::fused_attention(none, k.values, v.values, int64_t{1}, 0.1, none, lse, kernels::QkvCodes{}, kernels::WindowBias{});
  kernels::fused_attention_grad(none, q, k, v, none, lse, int64_t{1}, 0.1, none, dkv.narrow(-1, 0, 64), dkv.narrow(-1, 64, 64),
                                kernels::WindowBias{}, Tensor());
  CHECK(largest(dkv.to_vector<double>()) == 0);
}
