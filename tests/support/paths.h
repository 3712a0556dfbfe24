// Where the repository is: as it was when the tests were built, or MESA_TEST_SOURCE_DIR where a bundle of them runs elsewhere.
#pragma once
#include <cstdlib>
#include <string>

namespace mesa::testing {

inline std::string source_dir() {
  const char* moved = std::getenv("MESA_TEST_SOURCE_DIR");
  return moved != nullptr && *moved != 0 ? moved : MESA_SOURCE_DIR;
}

}  // namespace mesa::testing
