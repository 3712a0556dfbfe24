// Fuzzing entry: bytes as an IDX file, plain or gzip.
#include "mesa/base/error.h"
#include "mesa/data/formats.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  try {
    mesa::parse_idx(bytes, size, "fuzz");
  } catch (const mesa::Error&) {
  }
  return 0;
}
