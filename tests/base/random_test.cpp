// Counter-based random numbers: known answers, independence of order, distributions.
#include "mesa/base/random.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <set>

#include "mesa/kernels/elementwise.h"
#include "support/random.h"

using namespace mesa;
using namespace mesa::testing;

TEST_CASE("philox: the published known answers of philox4x32-10") {
  struct Known {
    uint64_t low, high, key;
    uint32_t word[4];
  };
  const Known known[] = {
      {0, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {~0ull, ~0ull, ~0ull, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {0x85a308d3243f6a88ull, 0x0370734413198a2eull, 0x299f31d0a4093822ull, {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const Known& k : known) {
    const Philox4 block = philox(k.low, k.high, k.key);
    for (int i = 0; i < 4; ++i) CHECK(block.word[i] == k.word[i]);
  }
}

TEST_CASE("random: an element's number depends on neither order nor neighbours") {
  INFO(seed_note());
  const RandomKey key = RandomKey::of(test_seed(), "stream", 5);
  const Tensor x = tensor_of({1000}, std::vector<double>(1000, 1.0), DType::f32), all = empty_like(x);
  kernels::dropout(x, all, 0.25, key);
  for (int64_t i : {0, 1, 7, 500, 999}) {
    const bool keeps = uniform(random_word(key, i)) >= 0.25f;
    CHECK((all.data<float>()[i] != 0) == keeps);
  }
  const Tensor front = Tensor::empty({137}, DType::f32);
  kernels::dropout(x.narrow(0, 0, 137), front, 0.25, key);
  for (int64_t i = 0; i < 137; ++i) CHECK(front.data<float>()[i] == all.data<float>()[i]);
}

TEST_CASE("random: seeds, streams and steps give different numbers") {
  std::set<uint32_t> words;
  for (uint64_t seed : {1, 2})
    for (const char* stream : {"a", "b"})
      for (uint64_t step : {1, 2}) words.insert(random_word(RandomKey::of(seed, stream, step), 0));
  CHECK(words.size() == 8);
}

TEST_CASE("random: uniform and normal streams have the moments of their distributions") {
  INFO(seed_note());
  constexpr int n = 100000;
  RandomStream random(RandomKey::of(test_seed(), "moments", 0));
  double sum = 0, squares = 0, mean = 0;
  std::vector<int> counts(7);
  for (int i = 0; i < n; ++i) {
    const double x = random.normal(), u = random.uniform(-1, 3);
    REQUIRE((u >= -1 && u < 3));
    sum += x, squares += x * x, mean += u;
    ++counts[random.below(7)];
  }
  // Six standard errors of each mean.
  CHECK(std::abs(sum / n) < 6 / std::sqrt(n));
  CHECK(std::abs(squares / n - 1) < 6 * std::sqrt(2.0 / n));
  CHECK(std::abs(mean / n - 1) < 6 * 4 / std::sqrt(12.0 * n));
  for (int c : counts) CHECK(std::abs(c - n / 7.0) < 6 * std::sqrt(n / 7.0));
}
