// The codecs that come with the engine; docs/storage.md has their formulas and errors.
#pragma once
#include "mesa/storage/codec.h"

namespace mesa {

std::unique_ptr<Codec> make_exact_codec();
std::unique_ptr<Codec> make_host_codec();
std::unique_ptr<Codec> make_bf16_codec();
/// 8, 4 or 2 bits. Options: groups heads|layer|channel|<count>, range running|current, decay [0, 1), rounding stochastic|nearest.
std::unique_ptr<Codec> make_affine_codec(int bits, const CodecOptions& options);

}  // namespace mesa
