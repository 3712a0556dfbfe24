// The text of an error that a test expects.
#pragma once
#include <string>

#include "mesa/base/error.h"

namespace mesa::testing {

/// The text of the mesa::Error that `f` throws, "" if none; other exceptions pass.
template <class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

}  // namespace mesa::testing
