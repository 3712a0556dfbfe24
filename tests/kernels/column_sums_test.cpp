// The sums of columns that the gradients of gelu and of layer norm make in their own visit, against those of the gradient by itself.
#include <catch2/catch.hpp>
#include <cmath>

#include "mesa/kernels/elementwise.h"
#include "mesa/kernels/norm.h"
#include "support/kernels.h"

using namespace mesa;
using namespace mesa::testing;
using kernels::GroupLayout;

namespace {

std::string bits_of(const Tensor& t) { return {static_cast<const char*>(t.raw()), static_cast<size_t>(t.bytes())}; }

/// The rows of `sums` together are the sums of dx's rows, each sample's times its factor where there are any.
void check_sums(const Tensor& sums, const Tensor& dx, const std::vector<double>& factors = {}, double tolerance = 1e-6) {
  const int64_t width = sums.dim(1);
  const std::vector<double> parts = sums.to_vector<double>(), d = dx.to_vector<double>();
  std::vector<double> got(width), want(width), terms(width);
  for (size_t i = 0; i < parts.size(); ++i) got[i % width] += parts[i];
  for (size_t i = 0; i < d.size(); ++i) {
    const double x = factors.empty() ? d[i] : d[i] * factors[i * factors.size() / d.size()];
    want[i % width] += x, terms[i % width] += std::fabs(x);
  }
  for (int64_t c = 0; c < width; ++c) REQUIRE(std::fabs(got[c] - want[c]) <= tolerance * terms[c]);  // a NaN fails
}

struct Size {
  int64_t rows, width;
};
// With few columns and many, rows of no whole units, no rows.
const Size kShapes[] = {{40, 64}, {33, 72}, {7, 50}, {1, 8}, {300, 32}, {3, 2056}, {5, 4112}, {0, 16}};

std::vector<int64_t> parts_for(const Size& size) { return {1, 3, size.rows + 2, kernels::sum_parts(size.rows, size.width)}; }

/// What gelu_grad makes alone, and the same with sums: with y and without, and in the place of dy.
template <class Alone, class Summed>
void check_same(const Tensor& dy, const std::vector<int64_t>& parts, const Alone& alone, const Summed& summed) {
  const Tensor dx = empty_like(dy), y = empty_like(dy), got = empty_like(dy), again = empty_like(dy);
  alone(dy, dx, y);
  for (const int64_t n : parts) {
    CAPTURE(n);
    const Tensor sums = Tensor::empty({n, dy.dim(-1)}, DType::f32), repeated = empty_like(sums);
    for (const Tensor& t : {got, again, sums}) kernels::fill(t, std::nan(""));
    summed(dy, got, Tensor(), sums);
    REQUIRE(bits_of(got) == bits_of(dx));
    check_sums(sums, dx);
    kernels::copy(dy, got);
    summed(got, got, again, repeated);
    REQUIRE(bits_of(got) == bits_of(dx));
    REQUIRE(bits_of(again) == bits_of(y));
    REQUIRE(bits_of(repeated) == bits_of(sums));
  }
}

}  // namespace

TEST_CASE("gelu's gradient sums its columns in the same pass", "[kernels]") {
  if (test_device() != kCuda) return;
  INFO(seed_note());
  for (const Size& size : kShapes)
    for (const DType type : {DType::f32, DType::bf16}) {
      CAPTURE(size.rows, size.width, to_string(type));
      const Tensor x = random({size.rows, size.width}, type, "x"), dy = random({size.rows, size.width}, type, "dy");
      check_same(
          dy, parts_for(size), [&](const Tensor& d, const Tensor& dx, const Tensor& y) { staged(kernels::cuda::gelu_grad)(d, x, dx, y); },
          [&](const Tensor& d, const Tensor& dx, const Tensor& y, const Tensor& sums) {
            staged(kernels::cuda::gelu_grad_sums)(d, x, dx, y, sums);
          });
    }
  const Tensor x = random({4, 8}, DType::f32, "x");
  // What is not in whole packs, or of several dtypes, is right, too.
  const Tensor ends = random({41, 9}, DType::f32, "ends"), low = random({40, 8}, DType::bf16, "low");
  const auto shifted = [](const Tensor& t) { return t.reshape({t.numel()}).narrow(0, 1, 320).reshape({40, 8}); };
  for (const Tensor& at : {shifted(ends), low}) {
    const Tensor dy = random({40, 8}, DType::f32, "dy"), dx = empty_like(dy), got = empty_like(dy),
                 sums = Tensor::empty({3, 8}, DType::f32);
    staged(kernels::cuda::gelu_grad)(dy, at, dx, Tensor());
    staged(kernels::cuda::gelu_grad_sums)(dy, at, got, Tensor(), sums);
    CHECK(bits_of(got) == bits_of(dx));
    check_sums(sums, dx);
  }
  const auto sums_of = [&](const Shape& shape, DType type) {
    staged(kernels::cuda::gelu_grad_sums)(x, x, x, Tensor(), Tensor::empty(shape, type));
  };
  CHECK_THROWS_WITH(sums_of({2, 4}, DType::f32), Catch::Contains("gelu_grad: sums of shape [2, 4]"));
  CHECK_THROWS_WITH(sums_of({2, 8}, DType::bf16), Catch::Contains("gelu_grad: sums of shape [2, 8] bf16"));
}

TEST_CASE("gelu's gradient from codes sums its columns in the same pass", "[kernels][codec]") {
  if (test_device() != kCuda) return;
  INFO(seed_note());
  for (const Size& size : kShapes)
    for (const DType type : {DType::f32, DType::bf16})
      for (const int bits : {8, 4, 2}) {
        const auto& [rows, width] = size;
        if (rows == 0) continue;
        for (const GroupLayout& layout : {GroupLayout{1, (rows * width + 63) / 64, 64, true}, GroupLayout{rows, width, 1, false},
                                          GroupLayout{rows, 2, width / 2, false}, GroupLayout{1, 1, rows * width, false}}) {
          CAPTURE(rows, width, to_string(type), bits, layout.groups, layout.inner);
          const Tensor x = random({rows, width}, type, "x"), dy = random({rows, width}, type, "dy");
          const Tensor step = Tensor::zeros({layout.groups}, DType::f32), offset = Tensor::zeros({layout.groups}, DType::f32);
          const Tensor codes = Tensor::zeros({(x.numel() * bits + 7) / 8}, DType::u8);
          kernels::plain::quantize_current(x, layout, bits, true, RandomKey::of(1, "codes", 2), step, offset, codes, {});
          const kernels::Coded coded{codes, step, offset, layout, bits};
          check_same(
              dy, parts_for(size),
              [&](const Tensor& d, const Tensor& dx, const Tensor& y) { staged(kernels::cuda::gelu_grad_coded)(d, coded, dx, y); },
              [&](const Tensor& d, const Tensor& dx, const Tensor& y, const Tensor& sums) {
                staged(kernels::cuda::gelu_grad_coded_sums)(d, coded, dx, y, sums);
              });
        }
      }
}

TEST_CASE("layer norm's gradient sums its columns in the same pass", "[kernels]") {
  if (test_device() != kCuda) return;
  INFO(seed_note());
  struct Mix {
    DType dy, xhat, dx;
  };
  // Rows that a warp keeps, in whole pieces and not; more rows than blocks take at once; rows of a block; no rows.
  const Size shapes[] = {{40, 64}, {33, 72}, {7, 50}, {1, 8}, {12, 384}, {10, 1024}, {4300, 8}, {24, 2056}, {3, 1025}, {0, 16}};
  for (const auto& [rows, width] : shapes)
    for (const Mix& mix : {Mix{DType::f32, DType::f32, DType::f32}, Mix{DType::bf16, DType::bf16, DType::f32},
                           Mix{DType::bf16, DType::bf16, DType::bf16}, Mix{DType::f64, DType::f64, DType::f64}}) {
      CAPTURE(rows, width, to_string(mix.dy), to_string(mix.dx));
      const DType exact = mix.dx == DType::f64 ? DType::f64 : DType::f32;
      const Tensor dy = random({rows, width}, mix.dy, "dy"), xhat = random({rows, width}, mix.xhat, "xhat"),
                   gamma = random({width}, exact, "gamma"), beta = random({width}, exact, "beta"), rstd = random({rows}, exact, "rstd"),
                   before = random({rows, width}, mix.dx, "before"), factors = random({rows % 2 == 0 ? rows / 2 : rows}, exact, "factors");
      const auto run = [&](kernels::LayerNormGrads to, bool coded) {
        to.dx = empty_like(before), to.dgamma = empty_like(gamma), to.dbeta = empty_like(gamma), to.y = empty_like(xhat);
        kernels::copy(before, to.dx);
        if (to.dx_sums.defined()) to.dx_sums = empty_like(to.dx_sums), kernels::fill(to.dx_sums, std::nan(""));
        if (!coded) {
          staged(kernels::cuda::layer_norm_grad)(dy, xhat, rstd, gamma, beta, to);
          return to;
        }
        const GroupLayout layout{1, (rows * width + 63) / 64, 64, true};
        const Tensor step = Tensor::zeros({layout.groups}, DType::f32), offset = Tensor::zeros({layout.groups}, DType::f32),
                     codes = Tensor::zeros({rows * width}, DType::u8);
        kernels::plain::quantize_current(xhat, layout, 8, true, RandomKey::of(1, "codes", 2), step, offset, codes, {});
        staged(kernels::cuda::layer_norm_grad_coded)(dy, kernels::Coded{codes, step, offset, layout, 8}, rstd, gamma, beta, to);
        return to;
      };
      for (const bool coded : {false, true})
        for (const int copies : {0, 1, 2}) {
          if ((coded && (rows == 0 || mix.dx == DType::f64 || copies == 1)) || (copies == 2 && rows == 0)) continue;
          if (rows > 1000 && (coded || copies > 0 || mix.dy != DType::f32)) continue;  // what takes long on an emulated GPU
          CAPTURE(coded, copies);
          kernels::LayerNormGrads alone{.add_x = true, .dx_copy = copies > 0 ? Tensor::empty(dy.shape(), DType::bf16) : Tensor()};
          if (copies == 2) alone.copy_factors = factors;
          kernels::LayerNormGrads summed = alone;
          summed.dx_sums = Tensor::empty({kernels::layer_norm_grad_parts(rows, width), width}, exact);
          if (copies > 0) summed.dx_copy = Tensor::empty(dy.shape(), DType::bf16);
          const kernels::LayerNormGrads want = run(alone, coded), got = run(summed, coded), again = run(summed, coded);
          check_sums(got.dx_sums, got.dx, copies == 2 ? factors.to_vector<double>() : std::vector<double>(),
                     mix.dx == DType::bf16 ? 0.005 : 1e-6);
          REQUIRE(bits_of(again.dx_sums) == bits_of(got.dx_sums));
          for (const auto part : {&kernels::LayerNormGrads::dx, &kernels::LayerNormGrads::dgamma, &kernels::LayerNormGrads::dbeta,
                                  &kernels::LayerNormGrads::dx_copy, &kernels::LayerNormGrads::y})
            if ((want.*part).defined()) REQUIRE(bits_of(got.*part) == bits_of(want.*part));
        }
    }
}
