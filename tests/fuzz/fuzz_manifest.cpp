// Any bytes as the manifest of a checkpoint whose other files are what they are: it verifies, or is refused with a mesa::Error.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

#include "mesa/base/error.h"
#include "mesa/train/files.h"

namespace {

/// A folder with two small files, removed at the end.
struct Checkpoint {
  std::string path = (std::filesystem::temp_directory_path() / ("mesa-fuzz-" + std::to_string(getpid()))).string();
  Checkpoint() {
    std::filesystem::create_directories(path);
    write("state.json", "{}\n", 3);
    write("model.safetensors", "weights", 7);
  }
  ~Checkpoint() { std::filesystem::remove_all(path); }
  void write(const char* name, const void* data, size_t size) const {
    std::FILE* file = std::fopen((path + "/" + name).c_str(), "wb");
    if (file == nullptr || std::fwrite(data, 1, size, file) != size || std::fclose(file) != 0) std::abort();
  }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Checkpoint checkpoint;
  checkpoint.write("manifest.json", data, size);
  try {
    mesa::verify_folder(checkpoint.path);
  } catch (const mesa::Error&) {
  }
  return 0;
}
