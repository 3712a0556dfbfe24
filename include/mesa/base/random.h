// Counter-based random numbers (Philox4x32-10: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).
// A number depends on (seed, stream, step, element) alone: nothing to store, the same on every device, exact on resume.
#pragma once
#include <cstdint>
#include <string_view>

#include "mesa/base/dtype.h"

namespace mesa {

struct Philox4 {
  uint32_t word[4];
};

MESA_HD inline Philox4 philox(uint64_t counter_low, uint64_t counter_high, uint64_t key) {
  uint32_t c0 = static_cast<uint32_t>(counter_low), c1 = static_cast<uint32_t>(counter_low >> 32);
  uint32_t c2 = static_cast<uint32_t>(counter_high), c3 = static_cast<uint32_t>(counter_high >> 32);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

/// SplitMix64's finalizer: spreads every input bit over the output.
MESA_HD inline uint64_t mix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

/// 64-bit FNV-1a of a name, for stream keys.
inline uint64_t hash_name(std::string_view name) {
  uint64_t h = 0xCBF29CE484222325ull;
  for (char c : name) h = (h ^ static_cast<uint8_t>(c)) * 0x100000001B3ull;
  return h;
}

/// Names one stream of random numbers: (seed, what it is for) in `key`, the step in `step`; an element index selects the number.
struct RandomKey {
  uint64_t key = 0;
  uint64_t step = 0;
  /// Where the step stands in the memory of the device that draws, in place of `step`: work that is recorded once and run at many steps.
  const uint64_t* live = nullptr;
  /// Where this part begins in the elements of a whole that several ranks hold together: their numbers are those of one rank that holds
  /// all.
  uint64_t first = 0;

  static RandomKey of(uint64_t seed, std::string_view stream, uint64_t step, const uint64_t* live = nullptr) {
    return {mix64(seed ^ mix64(hash_name(stream))), step, live};
  }
  MESA_HD uint64_t now() const { return live != nullptr ? *live : step; }
};

/// Uniform in [0, 1) with 24 bits.
MESA_HD inline float uniform(uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; }

/// The 32-bit word of element i of a stream: word i%4 of counter i/4, counted from k.first.
MESA_HD inline uint32_t random_word(RandomKey k, uint64_t i) { return philox((i + k.first) / 4, k.now(), k.key).word[(i + k.first) % 4]; }

/// A sequential reader of one stream, for host code that draws a varying number of values (augmentation, shuffling, initialization).
class RandomStream {
 public:
  /// From the `block`th four words on.
  explicit RandomStream(RandomKey key, uint64_t block = 0) : key_(key), counter_(block) {}
  uint32_t next() {
    if (used_ == 4) {
      block_ = philox(counter_++, key_.step, key_.key);
      used_ = 0;
    }
    return block_.word[used_++];
  }
  /// Uniform in [low, high).
  double uniform(double low = 0, double high = 1) {
    const uint64_t bits = (uint64_t{next()} << 32 | next()) >> 11;
    return low + (high - low) * (static_cast<double>(bits) * 0x1p-53);
  }
  /// Uniform integer in [0, n), n > 0, without modulo bias worth the name (64-bit multiply-shift).
  uint64_t below(uint64_t n) {
    const uint64_t bits = uint64_t{next()} << 32 | next();
    return static_cast<uint64_t>((static_cast<unsigned __int128>(bits) * n) >> 64);
  }
  /// Standard normal (Box-Muller, one of the pair), of one block; within +-kFarthest.
  static constexpr double kFarthest = 8.6;  // sqrt(-2 log 2^-53) = 8.57
  double normal();

 private:
  RandomKey key_;
  uint64_t counter_;
  Philox4 block_{};
  int used_ = 4;
};

}  // namespace mesa
