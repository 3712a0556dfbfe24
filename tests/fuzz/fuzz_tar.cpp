// Fuzzing entry: bytes as a tar archive with samples. Whatever is found lies inside them.
#include <algorithm>
#include <cstdlib>

#include "mesa/base/error.h"
#include "mesa/data/tar.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  const mesa::ReadAt read = [&](uint64_t offset, uint8_t* to, size_t count) {
    if (offset > size || count > size - offset) std::abort();
    std::copy_n(bytes + offset, count, to);
  };
  try {
    for (const auto& sample : mesa::index_shard(read, size, "fuzz"))
      if (sample.offset > size || sample.size > size - sample.offset || sample.label < 0 || sample.label >= mesa::kMaxClasses) std::abort();
  } catch (const mesa::Error&) {
  }
  return 0;
}
