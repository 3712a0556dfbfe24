// What ops refuse, and that the message can be read.
#include <catch2/catch.hpp>
#include <cmath>

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

TEST_CASE("ops: windows and grids that do not fit are refused in words") {
  const auto var = [](const Shape& shape) { return Var(normal_tensor(shape, "x")); };
  const kernels::Windows good{4, 6, 2, 3, 1, 1, 4, 6};
  const auto with = [&](auto change) {
    kernels::Windows w = good;
    change(w);
    return error_of([&] { to_windows(var({1, 24, 2}), w); });
  };
  CHECK_NOTHROW(to_windows(var({1, 24, 2}), good));
  CHECK_THAT(with([](auto& w) { w.window_width = 4; }), Contains("windows of 2 x 4 do not tile a grid of 4 x 6"));
  CHECK_THAT(with([](auto& w) { w.shift_y = 2; }), Contains("a shift by 2 and 1 must be less than the window of 2 x 3"));
  CHECK_THAT(with([](auto& w) { w.inner_width = 7; }), Contains("cannot hold 4 x 7 tokens"));
  CHECK_THAT(with([](auto& w) { w.height = w.inner_height = 6; }), Contains("a grid of 6 x 6 for 24 tokens"));
  CHECK_THAT(with([](auto& w) { w = {}; }), Contains("do not tile"));
  CHECK_THAT(error_of([&] { from_windows(var({3, 6, 2}), good); }), Contains("needs [B 4, 6, C], not [3, 6, 2]"));
  CHECK_THAT(error_of([&] { from_windows(var({4, 6, 2}), {}); }), Contains("do not tile"));
  CHECK_THAT(error_of([&] {
               window_attention(var({1, 24, 6}), var({14, 1}), 1, 1, good);
             }),
             Contains("need a table of [15, 1], not [14, 1]"));
  CHECK_THAT(error_of([&] { window_bias(var({4, 1, 6, 6}), var({15, 2}), good); }), Contains("where [15, 1] is needed"));
  CHECK_THAT(error_of([&] { attention(var({1, 5, 4}), var({1, 3, 6}), 1, 1); }), Contains("kv [B, M, 2 C], not [1, 5, 4] and [1, 3, 6]"));
  CHECK_THAT(error_of([&] { merge_patches(var({1, 15, 2}), 3, 5); }), Contains("needs an even grid, not 3 x 5"));
  CHECK_THAT(error_of([&] { merge_patches(var({1, 15, 2}), 4, 4); }), Contains("of a grid 4 x 4 needs [B, 16, C]"));
  CHECK_THAT(error_of([&] { pad_grid(var({1, 15, 2}), 3, 5, 2, 5); }), Contains("cannot be padded to 2 x 5"));
  CHECK_THAT(error_of([&] { crop_grid(var({1, 15, 2}), 3, 5, 3, 6); }), Contains("cannot be cropped to 3 x 6"));
  const auto conv = [&](int64_t height, const Shape& w) {
    patch_conv(var({1, 24, 2}), height, 6, var(w), var({3}), DType::f32, DType::f32);
  };
  CHECK_THAT(error_of([&] { conv(4, {3, 1, 2, 2}); }), Contains("do not fit the weight [3, 1, 2, 2]"));
  CHECK_THAT(error_of([&] { conv(4, {3, 2, 4, 4}); }), Contains("does not divide into patches of 4"));
}

TEST_CASE("ops: hidden scores are not taken for a fault") {
  StoragePolicy policy("test", {{"*", "exact", {}, ""}});
  const kernels::Windows shifted{4, 4, 2, 2, 1, 1, 4, 4};
  Param table;
  table.value = normal_tensor({9, 1}, "table", DType::f32, MemoryKind::parameters);
  Tape tape(policy);
  tape.check_finite();
  const Var p = softmax(window_bias(Var(normal_tensor({4, 1, 4, 4}, "scores")), table, shifted));
  tape.backward({p}, {normal_tensor({4, 1, 4, 4}, "dp")});
  CHECK(tape.first_bad().empty());
  const std::vector<float> last = p.value().to_vector<float>();
  CHECK(last[3 * 16 + 1] == 0);  // places of two regions of the last window
  CHECK(last[3 * 16] == 1);
}

TEST_CASE("ops: the gradient of a table adds up over all the windows that are worked through in turns") {
  const kernels::Windows grid{56, 56, 7, 7, 3, 3, 56, 56};  // with four heads more windows than the scores of one turn
  const auto gradient = [&](bool at_once) {
    StoragePolicy policy("test", {{"*", "exact", {}, ""}});
    Param table;
    table.value = normal_tensor({169, 4}, "table", DType::f64, MemoryKind::parameters);
    const Var qkv(normal_tensor({1, 3136, 12}, "qkv", DType::f64));
    Tape tape(policy);
    const auto by_hand = [&] {
      const auto [q, k, v] = split_heads(to_windows(qkv, grid), 4);
      return from_windows(merge_heads(matmul(softmax(window_bias(matmul(q, k, true), table, grid)), v)), grid);
    };
    const Var y = at_once ? window_attention(qkv, table, 4, 1, grid) : by_hand();
    tape.backward({y}, {normal_tensor({1, 3136, 4}, "dy", DType::f64)});
    return table.grad.to_vector<double>();
  };
  const std::vector<double> got = gradient(true), want = gradient(false);
  for (size_t i = 0; i < want.size(); ++i) CHECK(std::abs(got[i] - want[i]) <= 1e-9);
}

TEST_CASE("ops: windows of an empty batch give their table a gradient of zero") {
  StoragePolicy policy("test", {{"*", "exact", {}, ""}});
  Param table;
  table.value = normal_tensor({9, 1}, "table", DType::f32, MemoryKind::parameters);
  table.grad = Tensor::empty({9, 1}, DType::f32);
  Tape tape(policy);
  const Var y = window_attention(Var(Tensor::empty({0, 4, 6}, DType::f32)), table, 1, 1, {2, 2, 2, 2, 0, 0, 2, 2});
  tape.backward({y}, {Tensor::empty({0, 4, 2}, DType::f32)});
  for (double g : table.grad.to_vector<double>()) CHECK(g == 0);
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
