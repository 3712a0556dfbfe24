// How one kernel name stands for its implementations: one for each CPU instruction set and one for CUDA.
// A missing backend is a missing source file: the weak symbols below are then null and the call says so.
#pragma once
#include <type_traits>
#include <vector>

#include "mesa/tensor/tensor.h"

namespace mesa::kernels {

inline const Tensor& leading_tensor(const Tensor& t) { return t; }

template <class Signature>
struct Kernel {
  const char* name;
  Signature* plain;
  Signature* avx2;
  Signature* avx512;
  Signature* cuda;

  /// Runs where the first tensor argument lives, and all others must live there too; on meta tensors nothing needs to be done.
  template <class... Args>
  void operator()(const Args&... args) const {
    const DeviceKind device = first_device(args...);
    if (device == DeviceKind::meta) return;
    (check_device(device, args), ...);
    Signature* chosen = cuda;
    if (device == DeviceKind::cpu) chosen = cpu_isa() == Isa::avx512 ? avx512 : cpu_isa() == Isa::avx2 ? avx2 : plain;
    check(chosen != nullptr, "this build has no ", to_string(device), " kernel ", name);
    chosen(args...);
  }

 private:
  template <class First, class... Rest>
  static DeviceKind first_device(const First& first, const Rest&... rest) {
    if constexpr (requires { leading_tensor(first); }) return leading_tensor(first).device().kind;
    else if constexpr (requires { leading_tensor(first.front()); }) return first.empty() ? DeviceKind::meta : leading_tensor(first.front()).device().kind;
    else return first_device(rest...);
  }
  template <class Arg>
  void check_device(DeviceKind device, const Arg& arg) const {
    if constexpr (std::is_same_v<Arg, Tensor>) {
      if (arg.defined() && arg.device().kind != device)
        fail("", name, ": one tensor is on ", to_string(device), " and another on ", to_string(arg.device().kind));
    }
  }
};

}  // namespace mesa::kernels

/// MESA_KERNEL(gelu, const Tensor& x, const Tensor& y) declares the implementations and the callable mesa::kernels::gelu.
#define MESA_KERNEL(name, ...)                                  \
  namespace plain {                                             \
  [[gnu::weak]] void name(__VA_ARGS__);                         \
  }                                                             \
  namespace avx2 {                                              \
  [[gnu::weak]] void name(__VA_ARGS__);                         \
  }                                                             \
  namespace avx512 {                                            \
  [[gnu::weak]] void name(__VA_ARGS__);                         \
  }                                                             \
  namespace cuda {                                              \
  [[gnu::weak]] void name(__VA_ARGS__);                         \
  }                                                             \
  inline const Kernel<void(__VA_ARGS__)> name { #name, &plain::name, &avx2::name, &avx512::name, &cuda::name }
