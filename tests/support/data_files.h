// Small files for the tests of the data floor: a folder that cleans up after itself, writers of each format, and where the shared sets lie.
#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "mesa/data/image.h"
#include "support/errors.h"

namespace mesa::testing {

using Bytes = std::vector<uint8_t>;

/// A new folder under the system's temporary one, removed with its contents.
class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }
  /// Writes a file, making the folders above it; returns its path.
  std::string write(const std::string& name, const Bytes& bytes) const;

 private:
  std::filesystem::path path_;
};

/// MESA_SHARED_DATA, or ../shared/data beside the sources; nothing where the folder (or `part` of it) is absent: the test warns and ends.
std::optional<std::filesystem::path> shared_data(const std::string& part);

/// A smooth picture with distinct corners, so that turns and mirrors show.
Image test_image(int height, int width, int channels);
Bytes encode_jpeg(const Image& image, int quality = 95, bool progressive = false);
Bytes encode_png(const Image& image);
/// CMYK ink values (0 is none) as Adobe stores them.
Bytes encode_adobe_cmyk_jpeg(const Image& ink);
Bytes gzip(const Bytes& bytes);
/// IDX bytes: the header for `dims`, then `values`.
Bytes idx_bytes(const std::vector<uint32_t>& dims, const Bytes& values);
/// A CIFAR file of `records` records with the given label in each, pixels counting up from the record number.
Bytes cifar_bytes(int records, int label_bytes, int label);

}  // namespace mesa::testing
