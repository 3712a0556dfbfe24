// Where tests compute. The same tests run on the CPU and, with MESA_TEST_DEVICE=cuda, on a GPU or the emulated one.
#pragma once
#include <array>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>

#include "mesa/base/cuda.h"
#include "mesa/kernels/codec.h"
#include "mesa/kernels/kernel.h"
#include "mesa/kernels/norm.h"
#include "mesa/kernels/optimizer.h"
#include "mesa/kernels/windows.h"

namespace mesa::testing {

inline Device test_device() {
  static const Device device = [] {
    const char* wish = std::getenv("MESA_TEST_DEVICE");
    if (wish == nullptr || std::string(wish) == "cpu") return kCpu;
    check(std::string(wish) == "cuda", "MESA_TEST_DEVICE is '", wish, "'; it may be cpu or cuda");
    check(cuda::available(), "MESA_TEST_DEVICE=cuda: ", cuda::unavailable());
    return kCuda;
  }();
  return device;
}

/// Twins of host tensors on the GPU. Buffers are copied whole, so that views and shared buffers stay what they are.
class Staging {
 public:
  Tensor operator()(const Tensor& t) {
    if (!t.defined() || t.device() != kCpu) return t;
    auto [found, fresh] = twins_.try_emplace(t.buffer()->id());
    Twin& twin = found->second;
    if (fresh) {
      twin.host = t.buffer();
      twin.device = Tensor::empty({t.buffer()->bytes() / size_of(t.dtype())}, t.dtype(), kCuda);
      cuda::copy_to_device(twin.device.raw(), twin.host->data(), twin.device.bytes());
    }
    return twin.device.as_strided(t.shape(), t.strides(), t.offset());
  }
  std::vector<Tensor> operator()(const std::vector<Tensor>& list) {
    std::vector<Tensor> out;
    for (const Tensor& t : list) out.push_back((*this)(t));
    return out;
  }
  std::vector<kernels::UpdateSlot> operator()(std::vector<kernels::UpdateSlot> slots) {
    for (auto& slot : slots)
      for (Tensor* t : {&slot.w, &slot.g, &slot.m, &slot.v, &slot.copy}) *t = (*this)(*t);
    return slots;
  }
  std::vector<kernels::AverageSlot> operator()(std::vector<kernels::AverageSlot> slots) {
    for (auto& slot : slots) slot = {(*this)(slot.average), (*this)(slot.value)};
    return slots;
  }
  kernels::Coding operator()(kernels::Coding r) {
    for (Tensor* t : {&r.alpha, &r.beta, &r.next_alpha, &r.next_beta, &r.step, &r.offset, &r.codes, &r.counts}) *t = (*this)(*t);
    return r;
  }
  kernels::Coded operator()(const kernels::Coded& c) { return {(*this)(c.codes), (*this)(c.step), (*this)(c.offset), c.layout, c.bits}; }
  std::array<kernels::Coding, 3> operator()(std::array<kernels::Coding, 3> all) {
    for (kernels::Coding& r : all) r = (*this)(r);
    return all;
  }
  kernels::WindowBias operator()(kernels::WindowBias w) {
    for (Tensor* t : {&w.table, &w.d_table}) *t = (*this)(*t);
    return w;
  }
  kernels::LayerNormGrads operator()(kernels::LayerNormGrads to) {
    for (Tensor* t : {&to.dx, &to.dx_copy, &to.dx_sums, &to.y, &to.dgamma, &to.dbeta}) *t = (*this)(*t);
    return to;
  }
  template <class T>
  const T& operator()(const T& other) {
    return other;
  }

  /// What the kernel wrote, back in the host tensors.
  void bring_back() {
    for (const auto& [id, twin] : twins_) cuda::copy_to_host(twin.host->data(), twin.device.raw(), twin.device.bytes());
  }

 private:
  struct Twin {
    std::shared_ptr<Buffer> host;
    Tensor device;
  };
  std::map<uint64_t, Twin> twins_;
};

/// A CUDA kernel that takes host tensors.
template <class... Args>
std::function<void(Args...)> staged(void (*kernel)(Args...)) {
  return [kernel](Args... args) {
    Staging staging;
    kernel(staging(args)...);
    staging.bring_back();
  };
}

}  // namespace mesa::testing
