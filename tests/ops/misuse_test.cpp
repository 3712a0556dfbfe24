// What ops refuse, and that the message can be read.
#include <catch2/catch.hpp>

#include "mesa/autograd/tape.h"
#include "mesa/ops/ops.h"
#include "support/errors.h"
#include "support/random.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

TEST_CASE("ops: shapes that do not fit are refused in words") {
  const auto var = [](const Shape& shape) { return Var(normal_tensor(shape, "x")); };
  CHECK_THAT(error_of([&] { bias(var({4, 3, 2}), var({1, 6, 2})); }), Contains("cannot add [1, 6, 2] to the rows of [4, 3, 2]"));
  CHECK_THAT(error_of([&] { bias(var({4, 2}), var({3, 2})); }), Contains("cannot add"));
  CHECK(bias(var({4, 3, 2}), var({1, 3, 2})).shape() == Shape{4, 3, 2});
  CHECK(bias(var({4, 3, 2}), var({2})).shape() == Shape{4, 3, 2});
  CHECK_THAT(error_of([&] { linear(var({}), var({2, 2}), {}); }), Contains("linear") && Contains("not a single number"));
  CHECK_THAT(error_of([&] { layer_norm(var({}), var({2}), var({2}), 1e-6); }), Contains("layer_norm") && Contains("not a single number"));
}

TEST_CASE("ops: a batch of no rows gives gradients of zero") {
  StoragePolicy policy("test", {{"*", "exact", {}, ""}});
  Param w;
  w.name = "w";
  w.value = normal_tensor({3, 5}, "w", DType::f32, MemoryKind::parameters);
  w.grad = Tensor::empty({3, 5}, DType::f32);
  Tape tape(policy);
  const Var y = linear(Var(Tensor::empty({0, 5}, DType::f32)), Var(w), {});
  tape.backward({y}, {Tensor::empty({0, 3}, DType::f32)});
  for (double g : w.grad.to_vector<double>()) CHECK(g == 0);
}
