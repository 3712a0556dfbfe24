// What tests ask of the stand-in for cuDNN.
#pragma once
#include <set>

namespace mesa::emulation {

/// The heuristics (cudnnBackendHeurMode_t) that are to take no graph. Null where the build has no cuDNN.
[[gnu::weak]] std::set<int>& refusing_heuristics();

}  // namespace mesa::emulation
