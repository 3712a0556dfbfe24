// Any text as a config: it is read, or refused with a mesa::Error; what was read survives being written and read again.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "mesa/train/config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  mesa::RunConfig config;
  try {
    config = mesa::parse_config(text, "fuzz");
  } catch (const mesa::Error&) {
    return 0;
  }
  if (!(mesa::parse_config(mesa::to_yaml(config), "written") == config)) std::abort();
  return 0;
}
