// The case table: one row for each op and shape, from which the harness derives every test of that op.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "mesa/ops/ops.h"

namespace mesa::testing {

/// One argument of a row. Activations come out of another op, weights are parameters; frozen ones and constants want no gradient.
struct Input {
  enum class Role { activation, weight, frozen, constant } role = Role::activation;
  enum class Fill { normal, away_from_zero, spread, distinct, distribution } fill = Fill::normal;
  Shape shape;
};

template <class... Dims>
Input normal(Dims... dims) {
  return {Input::Role::activation, Input::Fill::normal, {dims...}};
}
/// At least 0.1 from zero: for functions with a kink there.
template <class... Dims>
Input away_from_zero(Dims... dims) {
  return {Input::Role::activation, Input::Fill::away_from_zero, {dims...}};
}
/// Neighbours lie apart, so that a row of few elements has a variance worth dividing by.
template <class... Dims>
Input spread(Dims... dims) {
  return {Input::Role::activation, Input::Fill::spread, {dims...}};
}
/// Any two at least 1/64 apart: for a maximum.
template <class... Dims>
Input distinct(Dims... dims) {
  return {Input::Role::activation, Input::Fill::distinct, {dims...}};
}
template <class... Dims>
Input weight(Dims... dims) {
  return {Input::Role::weight, Input::Fill::normal, {dims...}};
}
/// Rows that sum to one.
template <class... Dims>
Input distribution(Dims... dims) {
  return {Input::Role::constant, Input::Fill::distribution, {dims...}};
}

/// What a row computes: one value, or the three of split_heads.
struct Outputs {
  std::vector<Var> vars;
  Outputs(const Var& y) : vars{y} {}
  Outputs(const std::array<Var, 3>& ys) : vars(ys.begin(), ys.end()) {}
};

struct Case {
  std::string name;
  std::vector<Input> inputs;
  std::function<Outputs(std::vector<Var>&)> run;
  bool bf16 = true;  ///< false where the op takes f32 and f64 only
  /// What an op inside gets that has a kink at zero: the inputs are drawn anew until none of it lies within 1/16 of zero, since a rounding
  /// that crosses a kink changes gradients at once.
  std::function<Var(std::vector<Var>&)> kinked = {};
  /// Inputs of products that an op rounds to bf16 inside, where no other op sees it: of each `period` elements those from `from` on.
  struct Inside {
    size_t input = 0;
    int64_t period = 1, from = 0;
  };
  std::vector<Inside> inside = {};

  /// "linear [2, 5, 8] [3, 8]"
  std::string title() const;
};

const std::vector<Case>& cases();

}  // namespace mesa::testing
