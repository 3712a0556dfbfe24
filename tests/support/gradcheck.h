// Runs a row of the case table: forward, backward against a random projection, and what the meter saw on the way.
#pragma once
#include "support/cases.h"
#include "support/device.h"
#include "support/random.h"

namespace mesa::testing {

using Numbers = std::vector<double>;

/// The arguments of a row and the directions its outputs are projected on, as doubles that every precision can start from.
struct Values {
  std::vector<Numbers> inputs;
  /// One projection for each output, drawn when the row first runs.
  mutable std::vector<Numbers> projections;
};
/// `representable` is the precision the values are rounded to.
Values draw_values(const Case& row, DType representable = DType::f32);

struct RunOptions {
  DType dtype = DType::f64;
  Device device = test_device();
  /// Parameters are handed to the op as they are; otherwise activations come out of another op, as inside a model.
  bool leaves = false;
  uint64_t step = 3;
  /// Passes whose gradients add up.
  int passes = 1;
  /// Sees what the row's own ops compute; see Tape::inspect.
  Tape::Inspection inspection = {};
};

struct RunResult {
  double loss = 0;                          ///< the projection <r, y>
  std::vector<Numbers> outputs, gradients;  ///< gradients of the inputs, in order; empty for constants
  int64_t kept = 0;                         ///< growth of live activation bytes after forward
  int64_t left = 0;                         ///< growth of them after backward
  int64_t peak = 0;                         ///< growth of the peak of all kinds
  int64_t steps = 0;                        ///< steps on the tape after forward
};
RunResult run_case(const Case& row, const Values& values, StoragePolicy& policy, const RunOptions& options = {});

/// A policy with one rule for every site.
StoragePolicy one_codec(const std::string& codec, const CodecOptions& options = {});

double norm(const Numbers& x);
/// |a - b| / |b| in the Euclidean norm; |a - b| where b is zero.
double relative_error(const Numbers& a, const Numbers& b);
double largest(const Numbers& x);
/// The largest |a_i - b_i|.
double largest_difference(const Numbers& a, const Numbers& b);

}  // namespace mesa::testing
