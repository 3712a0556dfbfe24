#include "mesa/train/health.h"

#include <catch2/catch.hpp>
#include <cmath>

using namespace mesa;

TEST_CASE("health: the error is that of what backward decodes, whatever the scale") {
  StoragePolicy policy("test", {{"*", "int4", {{"groups", "8"}, {"rounding", "nearest"}}, ""}});
  HealthMonitor monitor(2, {"*.b:x"}, policy);
  const Site a{"layer.a", "x"}, b{"layer.b", "x"};
  const double scale = GENERATE(1e-3, 1.0, 1e4);
  std::vector<float> values;
  for (int i = 0; i < 64; ++i) values.push_back(static_cast<float>(scale * std::sin(i * i)));
  const Tensor x = Tensor::from<float>({4, 16}, values), zero = Tensor::zeros({4, 16}, DType::f32);

  policy.begin(0, 0);
  monitor.begin(1);  // not a step that is looked at
  policy.save(x, a, nullptr);
  CHECK_FALSE(monitor.finish(1));

  policy.begin(0, 1);
  monitor.begin(2);
  const Saved saved = policy.save(x, a, nullptr), nothing = policy.save(zero, b, nullptr);
  const auto found = monitor.finish(2);
  REQUIRE(found);
  REQUIRE(found->rows.size() == 2);
  const std::vector<float> decoded = saved.get().to_vector<float>();
  double error = 0, norm = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    error += std::pow(static_cast<double>(decoded[i]) - values[i], 2);
    norm += std::pow(static_cast<double>(values[i]), 2);
  }
  CHECK(found->rows[0].site == "layer.a:x");
  CHECK(found->rows[0].codec == "int4");
  CHECK(found->rows[0].step == 2);
  CHECK(found->rows[0].relative_error == Approx(std::sqrt(error / norm)));
  CHECK(found->rows[0].relative_error > 0.01);
  CHECK(found->rows[1].relative_error == 0);
  REQUIRE(found->histograms.size() == 1);
  CHECK(found->histograms[0].first == "layer.b:x");
  CHECK(found->histograms[0].second.count == 64);

  policy.begin(0, 2);  // nobody looks any more
  policy.save(x, a, nullptr);
  CHECK_FALSE(monitor.finish(3));
}

TEST_CASE("health: what lies outside a running range is counted for the update alone") {
  StoragePolicy policy("test", {{"*", "int8", {{"groups", "layer"}, {"range", "running"}, {"decay", "0.9"}}, ""}});
  HealthMonitor monitor(2, {}, policy);
  const Site site{"layer", "x"};
  const auto save = [&](uint64_t step, float outlier) {
    policy.begin(0, step);
    std::vector<float> values(100, 0.5f);
    values[0] = 0, values[1] = 1, values[2] = outlier;
    policy.save(Tensor::from<float>({10, 10}, values), site, nullptr);
    policy.commit();
  };
  save(0, 1);   // calibrates
  save(1, 50);  // clamped, but in an update that nobody looks at
  monitor.begin(2);
  save(2, 90);
  const auto found = monitor.finish(2);
  REQUIRE(found);
  CHECK(found->rows.at(0).clamped == Approx(0.01));
}
