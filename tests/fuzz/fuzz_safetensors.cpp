// Any bytes as a safetensors file: they are read, or refused with a mesa::Error; what was read survives being written and read again.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "mesa/train/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  mesa::SafetensorsFile file;
  try {
    file = mesa::parse_safetensors(bytes, "fuzz");
  } catch (const mesa::Error&) {
    return 0;
  }
  const std::string written = mesa::format_safetensors(file.tensors, file.metadata);
  const mesa::SafetensorsFile again = mesa::parse_safetensors(written, "written");
  if (mesa::format_safetensors(again.tensors, again.metadata) != written) std::abort();
  return 0;
}
