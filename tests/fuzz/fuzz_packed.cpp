// Fuzzing entry: bytes as a packed file. The checksums of the table and of the end are mended first, which no mutation would hit.
#include <zlib.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "mesa/base/error.h"
#include "mesa/data/packed.h"

namespace {
void mend(std::vector<uint8_t>& bytes) {
  mesa::PackedEnd end;
  if (bytes.size() < sizeof end) return;
  const size_t at = bytes.size() - sizeof end;
  std::memcpy(&end, bytes.data() + at, sizeof end);
  if (end.table_offset <= at) end.table_crc32 = static_cast<uint32_t>(crc32_z(0, bytes.data() + end.table_offset, at - end.table_offset));
  end.crc32 = 0;
  end.crc32 = static_cast<uint32_t>(crc32_z(0, reinterpret_cast<const Bytef*>(&end), sizeof end));
  std::memcpy(bytes.data() + at, &end, sizeof end);
}
}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::vector<uint8_t> bytes(data, data + size);
  mend(bytes);
  try {
    const mesa::PackedTable table(bytes, "fuzz");
    for (int64_t i = 0; i < table.train() + table.test(); ++i) try {
        mesa::decode(table.picture(i), "fuzz", {1 << 20, 0});
      } catch (const mesa::Error&) {
      }
  } catch (const mesa::Error&) {
  }
  return 0;
}
