// Mixup and CutMix: which samples of a batch are mixed, and how much.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "mesa/tensor/mixing.h"

namespace mesa {

/// One draw for the whole batch, for each pair of samples, or for each sample by itself.
enum class MixMode : uint8_t { batch, pair, elem };
/// "batch", "pair" or "elem"; anything else throws Error naming `key`.
MixMode parse_mix_mode(const std::string& text, const std::string& key);

/// timm's Mixup (timm.data.mixup), but for the partner: there the sample at the mirrored place of the batch, here the neighbour
/// (Mixing::partner).
struct MixOptions {
  double mixup = 0, cutmix = 0;  ///< alpha of the distribution Beta(alpha, alpha) of the own share; 0: none of this kind
  double probability = 1;        ///< of mixing at all
  double switch_probability = 0.5;  ///< of CutMix where both are on
  MixMode mode = MixMode::batch;
  int64_t off_epoch = 0;  ///< from this epoch on nothing is mixed; 0: never ends

  bool on() const { return mixup > 0 || cutmix > 0; }
};

/// Samples `first`, first + 1, ... (an even number) of a global batch.
struct MixPlace {
  int64_t epoch = 0, batch = 0, first = 0;
};

/// The mixing of `count` samples (even) of height x width pixels. Depends on (seed, epoch, number of the batch, place in the global batch)
/// alone, so that any number of ranks mixes the same.
std::vector<Mixing> draw_mixing(const MixOptions& options, uint64_t seed, const MixPlace& place, int64_t count, int64_t height,
                                int64_t width);

}  // namespace mesa
