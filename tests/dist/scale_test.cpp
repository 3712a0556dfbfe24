// Scale on paper: the tables in docs/distributed.md are what the program computes of today's buckets.
#include <catch2/catch.hpp>
#include <cstdio>

#include "mesa/base/files.h"
#include "support/paths.h"
#include "support/process.h"

using namespace mesa::testing;
using Catch::Matchers::Contains;

TEST_CASE("scale: docs/distributed.md holds the program's tables", "[docs]") {
  const ProcessResult result = run("scale-model", {});
  REQUIRE(result.code == 0);
  const std::string docs = mesa::read_text(source_dir() + "/docs/distributed.md");
  int tables = 0;
  for (size_t at = 0, end; at < result.out.size(); at = end + 1, ++tables) {
    const size_t gap = result.out.find("\n\n", at);
    end = gap == std::string::npos ? result.out.size() : gap + 1;
    CHECK_THAT(docs, Contains(result.out.substr(at, end - at)));
  }
  CHECK(tables == 3);
}

TEST_CASE("scale: more images hide more, smaller gradients reduce sooner, and a wrong name is refused", "[docs]") {
  /// Columns of the row of 4,096 GPUs with 8 cards: all-reduce, not hidden, step, efficiency.
  const auto row = [](const std::vector<std::string>& args) {
    const ProcessResult result = run("scale-model", args);
    REQUIRE(result.code == 0);
    const size_t at = result.out.find("8 x 400 Gb/s | 4096 | ");
    REQUIRE(at != std::string::npos);
    std::vector<double> values(4);
    REQUIRE(std::sscanf(result.out.c_str() + at, "8 x 400 Gb/s | 4096 | %lf | %lf | %lf | %lf", &values[0], &values[1], &values[2],
                        &values[3]) == 4);
    return values;
  };
  const auto usual = row({}), few = row({"--images", "16"}), half = row({"--bf16"});
  CHECK(few[0] == usual[0]);
  CHECK(few[1] >= usual[1]);
  CHECK(few[3] < usual[3]);
  CHECK(half[0] < usual[0]);
  const ProcessResult wrong = run("scale-model", {"--models", "deit_smal"});
  CHECK(wrong.code == 1);
  CHECK_THAT(wrong.err, Contains("deit_small"));
}
