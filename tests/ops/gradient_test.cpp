// Every row of the case table: gradients against central differences in double, and f32 against double.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>

#include "support/gradcheck.h"

using namespace mesa;
using namespace mesa::testing;

namespace {

constexpr double kStep = 1e-5;  // central differences: h^2 from truncation and 1e-16 / h from rounding are then both about 1e-10
constexpr double kTolerance = 1e-7;

double loss_at(const Case& row, const Values& values) {
  StoragePolicy policy = one_codec("exact");
  return run_case(row, values, policy).loss;
}

double difference_quotient(const Case& row, Values values, size_t input, const Numbers& direction) {
  const Numbers at = values.inputs[input];
  double loss[2];
  for (int side : {0, 1}) {
    for (size_t i = 0; i < at.size(); ++i) values.inputs[input][i] = at[i] + (side ? kStep : -kStep) * direction[i];
    loss[side] = loss_at(row, values);
  }
  return (loss[1] - loss[0]) / (2 * kStep);
}

void check_gradient(const Case& row, const Values& values, size_t input, const Numbers& gradient) {
  const size_t n = values.inputs[input].size();
  REQUIRE(gradient.size() == n);
  const double scale = std::max(1e-2, largest(gradient));
  for (size_t i = 0; i < n && n <= 200; ++i) {
    INFO("element " << i);
    Numbers direction(n);
    direction[i] = 1;
    CHECK(std::abs(difference_quotient(row, values, input, direction) - gradient[i]) <= kTolerance * scale);
  }
  const Numbers direction = normal_values(static_cast<int64_t>(n), "direction");
  double slope = 0;
  for (size_t i = 0; i < n; ++i) slope += direction[i] * gradient[i];
  CHECK(std::abs(difference_quotient(row, values, input, direction) - slope) <= 10 * kTolerance * (scale + norm(gradient)));
}

}  // namespace

TEST_CASE("case table: gradients are those of central differences in double") {
  INFO(seed_note());
  for (const Case& row : cases()) {
    INFO(row.title());
    const Values values = draw_values(row);
    StoragePolicy policy = one_codec("exact");
    const RunResult result = run_case(row, values, policy);
    for (size_t i = 0; i < row.inputs.size(); ++i) {
      if (row.inputs[i].role == Input::Role::constant || row.inputs[i].role == Input::Role::frozen) {
        CHECK(result.gradients[i].empty());
        continue;
      }
      INFO("input " << i);
      check_gradient(row, values, i, result.gradients[i]);
    }
  }
}

TEST_CASE("case table: parameters as direct arguments get the same gradients, and several passes add up") {
  INFO(seed_note());
  for (const Case& row : cases()) {
    INFO(row.title());
    const Values values = draw_values(row);
    StoragePolicy policy = one_codec("exact");
    const RunResult once = run_case(row, values, policy);
    const RunResult leaves = run_case(row, values, policy, {.leaves = true});
    const RunResult thrice = run_case(row, values, policy, {.leaves = true, .passes = 3});
    for (size_t i = 0; i < row.inputs.size(); ++i) {
      INFO("input " << i);
      CHECK(relative_error(leaves.gradients[i], once.gradients[i]) <= 1e-14);
      Numbers triple = once.gradients[i];
      for (double& v : triple) v *= 3;
      CHECK(relative_error(thrice.gradients[i], triple) <= 1e-14);
    }
  }
}

TEST_CASE("case table: fp32 agrees with double") {
  INFO(seed_note());
  for (const Case& row : cases()) {
    INFO(row.title());
    const Values values = draw_values(row);
    StoragePolicy policy = one_codec("exact");
    const RunResult exact = run_case(row, values, policy), result = run_case(row, values, policy, {.dtype = DType::f32});
    for (size_t i = 0; i < exact.outputs.size(); ++i)
      CHECK(largest_difference(result.outputs[i], exact.outputs[i]) <= 5e-6 * std::max(1.0, largest(exact.outputs[i])));
    for (size_t i = 0; i < row.inputs.size(); ++i) {
      INFO("gradient of input " << i);
      CHECK(largest_difference(result.gradients[i], exact.gradients[i]) <= 1e-5 * std::max(1.0, largest(exact.gradients[i])));
    }
  }
}
