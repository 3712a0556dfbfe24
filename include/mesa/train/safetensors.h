// Reader and writer of the safetensors format: named tensors behind a JSON header, with nothing in it that could be executed.
#pragma once
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "mesa/tensor/tensor.h"

namespace mesa {

struct NamedTensor {
  std::string name;
  Tensor tensor;
};

struct SafetensorsFile {
  std::vector<NamedTensor> tensors;  ///< in the order of their data, CPU, MemoryKind::parameters
  std::map<std::string, std::string> metadata;

  /// The tensor of that name, or null.
  const Tensor* find(std::string_view name) const;
};

/// Writes contiguous CPU tensors. The bytes depend on names, values and metadata alone: tensors are ordered by falling element size, then
/// by name, and the header is padded so that the data begin at a multiple of 8. Throws mesa::Error for duplicate names, tensors that are
/// strided or not in host memory, and I/O errors. The file is synced to disk but not replaced atomically: see write_folder_atomically.
void write_safetensors(const std::string& path, std::span<const NamedTensor> tensors,
                       const std::map<std::string, std::string>& metadata = {});
std::string format_safetensors(std::span<const NamedTensor> tensors, const std::map<std::string, std::string>& metadata = {});

/// Reads and validates a file as strictly as the format asks: header length and UTF-8 JSON, no duplicate names, sizes without overflow,
/// offsets that tile the data exactly. Throws mesa::Error "<path>: ..." that names the tensor. Element types F32, BF16, F64, U8, I32 and I64
/// stay as they are; F16 becomes f32, BOOL u8, I8, I16 and U16 i32, U32 i64: the same values.
/// On the meta device nothing but the header is read.
SafetensorsFile read_safetensors(const std::string& path, Device device = kCpu);
/// The same from memory; `name` stands for the path in errors.
SafetensorsFile parse_safetensors(std::string_view bytes, const std::string& name);

}  // namespace mesa
