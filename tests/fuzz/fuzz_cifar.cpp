// Fuzzing entry: the first byte chooses CIFAR-10 or CIFAR-100, the rest is the file.
#include "mesa/base/error.h"
#include "mesa/data/formats.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  if (size == 0) return 0;
  try {
    mesa::check_cifar(bytes + 1, size - 1, bytes[0] % 2 == 0 ? mesa::kCifar10 : mesa::kCifar100, "fuzz");
  } catch (const mesa::Error&) {
  }
  return 0;
}
