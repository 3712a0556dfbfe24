// Every row of the case table: what the policy says it keeps is what the codec promised and what the meter saw.
#include <catch2/catch.hpp>

#include "support/audit.h"
#include "support/gradcheck.h"

using namespace mesa;
using namespace mesa::testing;

namespace {

int64_t told_bytes(const StoragePolicy& policy) {
  int64_t bytes = 0;
  for (const SiteRecord& record : policy.sites()) bytes += record.kept_bytes;
  return bytes;
}

void check_promises(const StoragePolicy& policy, const Setting& setting, const Case& row) {
  const bool of_parameter = row.name == "mul by a parameter" && make_codec(setting.codec, setting.options)->shares_input(DType::f32);
  for (const SiteRecord& record : policy.sites()) {
    INFO(record.site.name() << " " << record.shape);
    if (record.codec == "shared")
      CHECK(record.kept_bytes == 0);
    else if (record.codec == "statistic")
      CHECK((record.exact_bytes == 0 || record.kept_bytes == record.shape.numel() * size_of(record.dtype)));
    else if (record.site.name() == "mul:b" && of_parameter)
      CHECK(record.kept_bytes == 0);  // counted once, as a parameter
    else if (make_codec(setting.codec, setting.options)->leaves(test_device()))
      CHECK(record.kept_bytes == 0);
    else
      CHECK(record.kept_bytes == make_codec(setting.codec, setting.options)->packed_bytes(record.shape, record.dtype, record.site));
  }
}

}  // namespace

TEST_CASE("case table: kept bytes are those promised and those metered, and backward frees them all") {
  INFO(seed_note());
  for (const Setting& setting : settings())
    for (const Case& row : cases())
      for (DType dtype : {DType::f64, DType::f32, DType::bf16}) {
        const bool wide_test = setting.codec == "exact" || setting.codec == "bf16" || setting.codec == "int4";
        if (dtype == DType::f32 ? row.inputs[0].shape.numel() > 1000 && !wide_test : !wide_test || (dtype == DType::bf16 && !row.bf16))
          continue;
        INFO(row.title() << " in " << to_string(dtype) << ", " << setting.text());
        StoragePolicy policy = one_codec(setting.codec, setting.options);
        const RunResult result = run_case(row, draw_values(row, dtype), policy, {.dtype = dtype});
        CHECK(result.kept == told_bytes(policy));
        CHECK(result.left == 0);
        check_promises(policy, setting, row);
      }
}

TEST_CASE("case table: a plan on meta tensors keeps the same bytes and reaches the same peak") {
  INFO(seed_note());
  for (const Setting& setting : settings())
    for (const Case& row : cases()) {
      if (row.inputs[0].shape.numel() > 1000 || (!setting.options.empty() && setting.codec != "int8")) continue;
      INFO(row.title() << ", " << setting.text());
      const Values values = draw_values(row);
      StoragePolicy real = one_codec(setting.codec, setting.options), plan = one_codec(setting.codec, setting.options);
      const RunResult on_cpu = run_case(row, values, real), on_meta = run_case(row, values, plan, {.device = test_device() == kCuda ? kMetaCuda : kMeta});
      CHECK(on_meta.kept == on_cpu.kept);
      CHECK(on_meta.left == 0);
      CHECK(on_meta.steps == on_cpu.steps);
      CHECK(told_bytes(plan) == told_bytes(real));
      // Only scratch inside kernels and codecs is unknown to a plan: partial sums, a contiguous copy, the ranges of running groups.
      CHECK(on_meta.peak <= on_cpu.peak);
      CHECK(2 * on_meta.peak >= on_cpu.peak);
    }
}
