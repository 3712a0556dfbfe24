// Tensors as views of buffers: strides, bounds, conversions.
#include "mesa/tensor/tensor.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <numeric>

using namespace mesa;
using Catch::Matchers::Contains;

namespace {

Tensor counting(const Shape& shape) {
  std::vector<float> values(shape.numel());
  std::iota(values.begin(), values.end(), 0.0f);
  return Tensor::from<float>(shape, values);
}

}  // namespace

TEST_CASE("tensor: views share the buffer and name the right elements") {
  const Tensor x = counting({2, 3, 4});
  CHECK(x.transpose(0, 2).to_vector<float>()[1] == 12);
  CHECK(x.transpose(0, 2).shape() == Shape{4, 3, 2});
  CHECK(x.transpose(-1, -2).to_vector<float>() ==
        std::vector<float>{0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11, 12, 16, 20, 13, 17, 21, 14, 18, 22, 15, 19, 23});
  CHECK(x.narrow(1, 1, 2).to_vector<float>() == std::vector<float>{4, 5, 6, 7, 8, 9, 10, 11, 16, 17, 18, 19, 20, 21, 22, 23});
  CHECK(x.select(1, 2).to_vector<float>() == std::vector<float>{8, 9, 10, 11, 20, 21, 22, 23});
  CHECK(x.select(1, 2).shape() == Shape{2, 4});
  CHECK(x.split_last(2).shape() == Shape{2, 3, 2, 2});
  CHECK(x.split_last(2).transpose(1, 2).to_vector<float>()[2] == 4);
  CHECK(x.as_strided({3}, {5}, 1).to_vector<float>() == std::vector<float>{1, 6, 11});
  CHECK(x.reshape({6, 4}).select(0, 5).buffer() == x.buffer());
  x.select(0, 1).data<float>()[0] = -1;
  CHECK(x.to_vector<float>()[12] == -1);
}

TEST_CASE("tensor: contiguity and uniform rows") {
  const Tensor x = counting({2, 3, 4});
  CHECK(x.is_contiguous());
  CHECK(x.has_uniform_rows());
  CHECK(x.rows() == 6);
  const Tensor third = x.narrow(-1, 1, 2);  // a slice of the last axis: rows of 2 at distance 4
  CHECK_FALSE(third.is_contiguous());
  CHECK(third.has_uniform_rows());
  CHECK(third.row_stride() == 4);
  CHECK_FALSE(x.transpose(1, 2).has_uniform_rows());
  CHECK_FALSE(x.narrow(1, 0, 2).has_uniform_rows());
  CHECK(x.select(1, 0).has_uniform_rows());
  CHECK(x.select(1, 0).row_stride() == 12);
  CHECK(counting({1, 5}).transpose(0, 1).is_contiguous());
  const Tensor empty = Tensor::empty({0, 4}, DType::f32);
  CHECK(empty.rows() == 0);
  CHECK(empty.to_vector<float>().empty());
  CHECK(Tensor::empty({}, DType::f64).numel() == 1);
}

TEST_CASE("tensor: without elements everything is contiguous") {
  const Tensor x = Tensor::empty({2, 0, 3}, DType::f32);
  CHECK(x.is_contiguous());
  CHECK(x.reshape({0, 6}).numel() == 0);
  CHECK_FALSE(Tensor::empty({12}, DType::f32).as_strided({2, 2, 3}, {3, 0, 1}, 0).has_uniform_rows());
}

TEST_CASE("tensor: what cannot be is refused") {
  const Tensor x = counting({2, 3});
  CHECK_THROWS_WITH(x.reshape({4}), Contains("cannot reshape [2, 3] to [4]"));
  CHECK_THROWS_WITH(x.transpose(0, 1).reshape({6}), Contains("strided"));
  CHECK_THROWS_WITH(x.narrow(1, 2, 2), Contains("axis 1 of [2, 3]"));
  CHECK_THROWS_WITH(x.select(2, 0), Contains("axis 2"));
  CHECK_THROWS_WITH(x.split_last(2), Contains("cannot split"));
  CHECK_THROWS_WITH(x.as_strided({3}, {3}, 0), Contains("leaves its buffer"));
  CHECK_THROWS_WITH(x.data<double>(), Contains("fp32 was read as fp64"));
  CHECK_THROWS_WITH((Tensor::from<float>({3}, {1, 2})), Contains("cannot hold 2 values"));
  CHECK_THROWS_AS(Tensor::empty({int64_t{1} << 62, 1}, DType::f64), Error);
  CHECK_THROWS_AS((Shape{-1, 2}), Error);
  CHECK_THROWS_AS((Shape{1, 1, 1, 1, 1, 1, 1}), Error);
}

TEST_CASE("bf16: rounds to nearest, ties to even, and NaN stays NaN and infinity infinity") {
  CHECK(float(bf16(1.0f)) == 1.0f);
  CHECK(float(bf16(1.0f + 0x1p-8f)) == 1.0f);                // halfway: to the even side
  CHECK(float(bf16(1.0f + 3 * 0x1p-8f)) == 1.0f + 0x1p-6f);  // halfway: up to even
  CHECK(float(bf16(1.0f + 0x1.1p-8f)) == 1.0f + 0x1p-7f);
  CHECK(float(bf16(-1.0f - 0x1.1p-8f)) == -1.0f - 0x1p-7f);
  CHECK(std::isnan(float(bf16(NAN))));
  CHECK(float(bf16(-INFINITY)) == -INFINITY);
  CHECK(float(bf16(3.4e38f)) == INFINITY);
}
