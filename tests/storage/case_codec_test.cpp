// Every row of the case table with every codec: decoded values within the stated error, gradients within what follows from it.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>

#include "support/audit.h"
#include "support/gradcheck.h"

using namespace mesa;
using namespace mesa::testing;

namespace {

/// All combinations in f32; the other precisions, and the rows that exist for their size, with the settings that are used most.
std::vector<DType> dtypes_for(const Setting& setting, const Case& row) {
  const auto groups = setting.options.find("groups");
  const bool common = groups == setting.options.end() || (setting.codec == "int8" && groups->second != "8" && groups->second != "6 channels");
  if (!common) return row.inputs[0].shape.numel() < 1000 ? std::vector{DType::f32} : std::vector<DType>();
  return row.bf16 ? std::vector{DType::f64, DType::f32, DType::bf16} : std::vector{DType::f64, DType::f32};
}

StoragePolicy audited(const Setting& setting) {
  register_test_codecs();
  CodecOptions options = setting.options;
  options["codec"] = setting.codec;
  return one_codec("audited", options);
}

}  // namespace

TEST_CASE("case table: every codec decodes within its stated error") {
  INFO(seed_note());
  int64_t decoded = 0;
  for (const Setting& setting : settings())
    for (const Case& row : cases())
      for (DType dtype : dtypes_for(setting, row)) {
        INFO(row.title() << " in " << to_string(dtype) << ", " << setting.text());
        StoragePolicy policy = audited(setting);
        Audit::get() = {};
        const RunResult result = run_case(row, draw_values(row, dtype), policy, {.dtype = dtype});
        INFO("worst at " << Audit::get().worst_site);
        CHECK(Audit::get().worst <= 1.0);
        for (const Numbers& gradient : result.gradients) CHECK(std::isfinite(largest(gradient)));
        decoded += Audit::get().decoded;
      }
  CHECK(decoded > 5000);  // the audit did look
}

TEST_CASE("case table: lossless storage changes no bit of a gradient") {
  INFO(seed_note());
  for (const Case& row : cases()) {
    INFO(row.title());
    const Values values = draw_values(row);
    StoragePolicy exact = one_codec("exact"), host = one_codec("host");
    CHECK(run_case(row, values, exact).gradients == run_case(row, values, host).gradients);
  }
}

namespace {

/// How far the errors of the kept elements can move each gradient: every element of every site is moved by its bound, both ways and one at
/// a time, and the larger changes are summed.
std::vector<Numbers> propagated_bounds(const Case& row, const Values& values, const std::vector<Numbers>& undisturbed,
                                       const std::map<std::string, Numbers>& bounds) {
  std::vector<Numbers> total;
  for (const Numbers& g : undisturbed) total.emplace_back(g.size(), 0.0);
  Probe& probe = Probe::get();
  for (const auto& [site, elements] : std::map(probe.seen)) {
    REQUIRE(bounds.count(site) == 1);
    probe.site = site;
    for (probe.element = 0; probe.element < elements; ++probe.element) {
      std::vector<Numbers> moved[2];
      for (int side : {0, 1}) {
        probe.change = (side ? 1 : -1) * bounds.at(site)[probe.element];
        StoragePolicy policy = one_codec("probe");
        moved[side] = run_case(row, values, policy).gradients;
      }
      for (size_t i = 0; i < total.size(); ++i)
        for (size_t j = 0; j < total[i].size(); ++j)
          total[i][j] += std::max(std::abs(moved[0][i][j] - undisturbed[i][j]), std::abs(moved[1][i][j] - undisturbed[i][j]));
    }
  }
  probe.site.clear();
  return total;
}

}  // namespace

TEST_CASE("case table: int8 storage moves gradients by no more than its error allows") {
  INFO(seed_note());
  int rows = 0;
  for (const Case& row : cases()) {
    if (row.inputs[0].shape.numel() > 200) continue;
    INFO(row.title());
    const Values values = draw_values(row);
    StoragePolicy exact = one_codec("exact"), int8 = audited({"int8", {{"groups", "heads"}}});
    register_test_codecs();
    StoragePolicy probe = one_codec("probe");
    Audit::get() = {};
    Probe::get() = {};
    Probe::get().share = make_codec("int8", {})->error_bound(0, 1);
    const auto plain = run_case(row, values, exact).gradients, copied = run_case(row, values, probe).gradients;
    const auto coded = run_case(row, values, int8).gradients;
    const auto bounds = propagated_bounds(row, values, copied, Audit::get().bounds);
    for (size_t i = 0; i < plain.size(); ++i) {
      INFO("input " << i);
      CHECK(largest_difference(copied[i], plain[i]) <= 1e-12 * std::max(1.0, largest(plain[i])));  // the lossy path itself is exact
      for (size_t j = 0; j < plain[i].size(); ++j)
        CHECK(std::abs(coded[i][j] - copied[i][j]) <= 1.25 * bounds[i][j] + 1e-9);  // a quarter for errors that act together
    }
    rows += !Probe::get().seen.empty();
  }
  CHECK(rows > 20);
}
