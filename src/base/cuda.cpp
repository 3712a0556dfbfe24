#include "mesa/base/cuda.h"

namespace mesa::cuda {

bool built() { return detail::find_device != nullptr; }

std::string unavailable() {
  if (!built()) return "this build of Mesa has no CUDA backend";
  static const std::string reason = detail::find_device();
  return reason;
}

}  // namespace mesa::cuda
