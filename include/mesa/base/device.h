// Where a tensor lives.
#pragma once
#include <cstdint>

namespace mesa {

/// `meta` tensors have shapes and byte counts but no memory: a step on them is a plan of a real one.
enum class DeviceKind : uint8_t { cpu, cuda, meta };

struct Device {
  DeviceKind kind = DeviceKind::cpu;
  int index = 0;
  bool operator==(const Device&) const = default;
};

inline constexpr Device kCpu{};
inline constexpr Device kMeta{DeviceKind::meta, 0};
inline constexpr Device kCuda{DeviceKind::cuda, 0};
inline constexpr Device kPinned{DeviceKind::cpu, 1};       ///< host memory that a GPU copies from and to beside its work
inline constexpr Device kMetaCuda{DeviceKind::meta, 1};    ///< the plan of a step on a GPU
inline constexpr bool is_gpu(Device d) { return d.kind == DeviceKind::cuda || d == kMetaCuda; }

const char* to_string(DeviceKind kind);

/// Vector instruction sets that CPU kernels are compiled for, in rising order.
enum class Isa : uint8_t { plain, avx2, avx512 };

/// The best set this CPU has; MESA_CPU=plain|avx2|avx512 lowers it (never raises it).
Isa cpu_isa();
const char* to_string(Isa isa);
/// True if the CPU multiplies bf16 natively (avx512_bf16).
bool cpu_has_bf16();

}  // namespace mesa
