#include "mesa/base/threads.h"

#include <atomic>
#include <catch2/catch.hpp>
#include <vector>

#include "mesa/base/error.h"

using namespace mesa;

TEST_CASE("threads: every number is called once, and the error of the lowest one that failed is thrown", "[base]") {
  for (int64_t threads : {0, 1, 3, 50}) {
    std::vector<std::atomic<int>> calls(40);
    parallel_for(40, threads, [&](int64_t i) { ++calls[i]; });
    for (const auto& count : calls) CHECK(count == 1);
    parallel_for(0, threads, [](int64_t) { FAIL("nothing is to be done"); });
    std::atomic<int> begun{0};
    const auto failing = [&](int64_t i) {
      ++begun;
      if (i >= 5) fail("number ", i, " fails");
    };
    CHECK_THROWS_WITH(parallel_for(100'000, threads, failing), Catch::Contains("number 5 fails"));
    CHECK(begun < 100'000);
  }
}
