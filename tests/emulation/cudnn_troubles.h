// What tests ask of the stand-in for cuDNN.
#pragma once
#include <cstdint>
#include <map>

namespace mesa::emulation {

/// What goes wrong, as statuses of cuDNN (cudnnStatus_t), and how much workspace plans want.
struct CudnnTroubles {
  std::map<int, int> heuristics;  ///< by cudnnBackendHeurMode_t
  int running = 0;                ///< of every plan
  int runs = 0;                   ///< that were tried
  int64_t workspace = 256;
};
/// Null where the build has no cuDNN.
[[gnu::weak]] CudnnTroubles& cudnn_troubles();

}  // namespace mesa::emulation
