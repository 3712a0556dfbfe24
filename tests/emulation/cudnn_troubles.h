// What tests ask of the stand-in for cuDNN.
#pragma once
#include <cstdint>
#include <map>
#include <vector>

namespace mesa::emulation {

/// What goes wrong, as statuses of cuDNN (cudnnStatus_t), and how much workspace plans want.
struct CudnnTroubles {
  std::map<int, int> heuristics;                ///< by cudnnBackendHeurMode_t
  int planning = 0, running = 0;                ///< of every plan
  int runs = 0;                                 ///< that were tried
  int plans = 0;                                ///< that were made
  int64_t workspace = 256, workspace_each = 0;  ///< in all, and for each image
  bool fallback_wants_none = false;             ///< of cuDNN's second heuristic plans want no workspace
  std::vector<int> notes{};                     ///< of every engine, cudnnBackendNumericalNote_t
  bool handles = true;                          ///< whether the library starts
};
/// Null where the build has no cuDNN.
[[gnu::weak]] CudnnTroubles& cudnn_troubles();

}  // namespace mesa::emulation
