// Readers of the binary formats that hold many pictures in one file, from memory, so that tests and fuzzers reach them directly.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace mesa {

/// An array of unsigned bytes as the MNIST family stores it.
struct IdxArray {
  std::vector<int64_t> dims;  ///< [N] labels, [N, H, W] or [N, H, W, C] pictures
  std::vector<uint8_t> values;
};

/// Parses IDX (big-endian: 0, 0, type 8, rank, extents, bytes), gzip-compressed or plain. The extents are checked against the size of the
/// file before memory is taken. Throws Error naming `name` for truncation, bytes left over, damage, and types other than bytes.
IdxArray parse_idx(const uint8_t* bytes, size_t size, const std::string& name);

/// The binary CIFAR formats: records of label bytes and 3 x 32 x 32 planar pixels.
struct CifarLayout {
  int label_bytes;  ///< CIFAR-10: the label; CIFAR-100: the coarse label, then the fine one
  int classes;      ///< of the last label byte, the one that is used
  static constexpr int kSide = 32, kPlane = kSide * kSide, kPixelBytes = 3 * kPlane;
  int record_bytes() const { return label_bytes + kPixelBytes; }
};
inline constexpr CifarLayout kCifar10{1, 10};
inline constexpr CifarLayout kCifar100{2, 100};

/// The number of records in a file. Throws Error for an empty file, a size that is no multiple of a record, and labels out of range.
int64_t check_cifar(const uint8_t* bytes, size_t size, const CifarLayout& layout, const std::string& name);

}  // namespace mesa
