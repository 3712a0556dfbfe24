// The sums of columns that gelu's gradient makes in its own visit, against those of the gradient by itself.
#include <catch2/catch.hpp>
#include <cmath>

#include "mesa/kernels/elementwise.h"
#include "support/kernels.h"

using namespace mesa;
using namespace mesa::testing;
using kernels::GroupLayout;

namespace {

std::string bits_of(const Tensor& t) { return {static_cast<const char*>(t.raw()), static_cast<size_t>(t.bytes())}; }

/// The rows of `sums` together are the sums of dx's rows.
void check_sums(const Tensor& sums, const Tensor& dx) {
  const int64_t width = sums.dim(1);
  const std::vector<double> parts = sums.to_vector<double>(), d = dx.to_vector<double>();
  std::vector<double> got(width), want(width), terms(width);
  for (size_t i = 0; i < parts.size(); ++i) got[i % width] += parts[i];
  for (size_t i = 0; i < d.size(); ++i) want[i % width] += d[i], terms[i % width] += std::fabs(d[i]);
  for (int64_t c = 0; c < width; ++c) REQUIRE(std::fabs(got[c] - want[c]) <= 1e-6 * terms[c]);  // a NaN fails
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
