// bf16 against double: an op may differ by what rounding its result and its gradients explains, and by no more.
#include <algorithm>
#include <bit>
#include <catch2/catch.hpp>
#include <cmath>

#include "support/device.h"
#include "support/gradcheck.h"

using namespace mesa;
using namespace mesa::testing;

namespace {

/// Of many elements few samples tell enough.
uint64_t samples_of(const Case& row) { return row.inputs[0].shape.numel() < 500 ? 32 : 2; }

constexpr double kSingle = 1e-5;  // of the largest element: what arithmetic in f32 adds (the bound of the test of f32)
// Rounding up or down at random has at least the variance of rounding to nearest (f (1 - f) and min(f, 1 - f)^2 of a step), so the share of
// the error that is explained lies near 1, and above it only where few roundings make the error.
constexpr double kMost = 1.5, kMostOfFew = 4, kMostOfOne = 20;

/// Rounds a double up or down to bf16 at random, without bias: random bits are added below the last one that stays.
class RandomRounding {
 public:
  explicit RandomRounding(uint64_t sample) : key_(mix64(test_seed() ^ mix64(sample))) {}
  void operator()(const Tensor& t) {
    Numbers values = t.to_vector<double>();
    for (double& v : values) {
      constexpr uint64_t kDropped = (uint64_t{1} << 45) - 1;  // a double has 52 bits behind the point, bf16 seven
      v = std::bit_cast<double>((std::bit_cast<uint64_t>(v) + (mix64(key_ + ++count_) & kDropped)) & ~kDropped);
    }
    transfer(tensor_of(t.shape(), values, DType::f64), t);
  }

 private:
  uint64_t key_, count_ = 0;
};

/// The row in double with every result and gradient rounded where bf16 rounds it. Gradients of weights stay, since masters are f32, but for
/// those of convolutions on a GPU: no engine of cuDNN's writes f32 from bf16 operands.
RunResult rounded_run(const Case& row, Values values, uint64_t sample) {
  RandomRounding round(sample);
  RandomStream random(RandomKey::of(test_seed(), row.title() + " inside", sample));
  const auto move = [&](double& v) { v *= 1 + (random.next() % 2 ? 0x1p-8 : -0x1p-8); };
  for (const Case::Inside& part : row.inside) {  // as an error of the other factor: in the forward pass, and in the backward pass of dy
    Numbers& x = values.inputs[part.input];
    for (size_t i = 0; i < x.size(); ++i)
      if (static_cast<int64_t>(i) % part.period >= part.from) move(x[i]);
    for (Numbers& dy : values.projections)
      for (double& v : dy) move(v);
  }
  const auto inspection = [&](const Tensor& t, const std::string& name) {
    const bool own = !name.ends_with("project") && !name.starts_with("gradient of input");
    const bool kernel = test_device() == kCuda && row.name.starts_with("conv2d") && name == "gradient of input1";
    if ((own || kernel) && t.is_contiguous()) round(t);  // views are of what is rounded already
  };
  StoragePolicy policy("rounded", {{"*", "exact", {}, ""}, {"*:xhat", "bf16", {}, ""}});  // a norm keeps what is no result of an op
  return run_case(row, values, policy, {.inspection = inspection});
}

/// `error` against what the samples of `exact` show.
void check_explained(const Numbers& result, const Numbers& exact, const std::vector<const Numbers*>& samples) {
  const size_t n = exact.size();
  REQUIRE(result.size() == n);
  const double single = kSingle * std::max(1.0, largest(exact));
  Numbers error(n), variance(n);
  double sum = 0;
  for (size_t i = 0; i < n; ++i) {
    error[i] = std::max(0.0, std::abs(result[i] - exact[i]) - single);
    for (const Numbers* sample : samples) variance[i] += std::pow((*sample)[i] - exact[i], 2) / static_cast<double>(samples.size());
    sum += variance[i];
  }
  const double count = static_cast<double>(std::max<size_t>(n, 1));
  CHECK(norm(error) <= (kMost + kMostOfFew / std::sqrt(count)) * std::sqrt(sum));
  for (size_t i = 0; i < n; ++i) error[i] = error[i] == 0 ? 0 : error[i] / std::sqrt(variance[i] + sum / count);
  CHECK(largest(error) <= kMostOfOne);
}

}  // namespace

TEST_CASE("case table: bf16 differs from double by what its roundings explain") {
  INFO(seed_note());
  for (const Case& row : cases()) {
    if (!row.bf16) continue;
    INFO(row.title());
    const Values values = draw_values(row, DType::bf16);
    StoragePolicy policy = one_codec("exact");
    run_case(row, values, policy);  // draws the projections
    for (Numbers& r : values.projections) r = tensor_of({static_cast<int64_t>(r.size())}, r, DType::bf16).to_vector<double>();
    const RunResult exact = run_case(row, values, policy);
    const RunResult result = run_case(row, values, policy, {.dtype = DType::bf16});
    std::vector<RunResult> samples;
    for (uint64_t s = 0; s < samples_of(row); ++s) samples.push_back(rounded_run(row, values, s));
    const auto check_list = [&](const char* what, std::vector<Numbers> RunResult::*list) {
      for (size_t i = 0; i < (exact.*list).size(); ++i) {
        INFO(what << " " << i);
        std::vector<const Numbers*> of_samples;
        for (const RunResult& sample : samples) of_samples.push_back(&(sample.*list)[i]);
        check_explained((result.*list)[i], (exact.*list)[i], of_samples);
      }
    };
    check_list("output", &RunResult::outputs);
    check_list("gradient of input", &RunResult::gradients);
  }
}
