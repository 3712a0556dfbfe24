// Scopes, shapes and the helper that guesses what was meant.
#include <catch2/catch.hpp>
#include <thread>

#include "mesa/base/error.h"
#include "mesa/base/scope.h"
#include "mesa/base/shape.h"

using namespace mesa;
using Catch::Matchers::Contains;
using Catch::Matchers::StartsWith;

TEST_CASE("scope: paths nest, belong to their thread, and heads are inherited") {
  CHECK(Scope::path().empty());
  CHECK(Scope::heads() == 1);
  {
    const Scope block("blocks.3", 6);
    const Scope nothing("");
    const Scope attn("attn");
    CHECK(Scope::path() == "blocks.3.attn");
    CHECK(Scope::join("qkv") == "blocks.3.attn.qkv");
    CHECK(Scope::heads() == 6);
    std::thread([] { CHECK(Scope::path().empty()); }).join();
  }
  CHECK(Scope::path().empty());
  CHECK(Scope::join("x") == "x");
  CHECK(Scope::heads() == 1);
}

TEST_CASE("error: the text begins with the scope and ends with the place") {
  const Scope scope("blocks.0");
  try {
    check(false, "cannot do ", 3, " things");
    FAIL("no error");
  } catch (const Error& error) {
    CHECK_THAT(error.what(), StartsWith("blocks.0: cannot do 3 things") && Contains("base_test.cpp:"));
  }
}

TEST_CASE("nearest: small mistakes find their word, strangers find none") {
  const std::vector<std::string> words{"exact", "int8", "rebuild", "bf16"};
  CHECK(nearest("exat", words) == "exact");
  CHECK(nearest("rebuidl", words) == "rebuild");
  CHECK(nearest("int8", words) == "int8");
  CHECK(nearest("completely different", words).empty());
  CHECK(nearest("x", {}).empty());
}

TEST_CASE("shape: extents, counting and text") {
  const Shape s{2, 3, 4};
  CHECK(s.numel() == 24);
  CHECK(s[-1] == 4);
  CHECK(s.without(1) == Shape{2, 4});
  CHECK(s.without(-1) == Shape{2, 3});
  CHECK(s.with(-1, 9) == Shape{2, 3, 9});
  CHECK(to_string(s) == "[2, 3, 4]");
  CHECK(to_string(Shape{}) == "[]");
  CHECK(Shape{}.numel() == 1);
  CHECK_FALSE(Shape{2} == Shape{2, 1});
  CHECK_THROWS_AS((Shape{int64_t{1} << 40, int64_t{1} << 40}.numel()), Error);
}
