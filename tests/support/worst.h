// The largest of several errors.
#pragma once
#include <cmath>

namespace mesa::testing {

/// The larger one, or NaN if one is: std::max would lose it.
template <class T>
T worse(T worst, T error) {
  return std::isnan(worst) || error <= worst ? worst : error;
}

}  // namespace mesa::testing
