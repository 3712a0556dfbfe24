// Kernels with operands to run them on: what mesa-bench --kernels times.
#pragma once
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "mesa/tensor/tensor.h"

namespace mesa {

/// One kernel on fixed operands; bytes and flops as KernelResult has them.
struct Work {
  std::string name;
  double bytes, flops;
  std::function<void()> call;
};

/// The extents that all kernels of a step share.
struct Extents {
  int64_t B, N, C, H, hidden, classes, image, channels, patch;
  DType type;  // of matrix operands
  Device device;
  DType pictures() const { return is_gpu(device) ? type : DType::f32; }  // as training gives them: picture_dtype
  double rows() const { return static_cast<double>(B * N); }
};

/// Random tensors, each drawn once for its shape and copied on the device from then on.
using DrawnValues = std::map<std::pair<std::vector<int64_t>, DType>, Tensor>;

/// About normal, the same at each call.
Tensor random_values(const Shape& shape, DType dtype, Device device);

/// A list of kernels, each with operands of its own.
class WorkList {
 public:
  WorkList(const Extents& e, std::shared_ptr<DrawnValues> drawn) : e_(e), drawn_(std::move(drawn)) {}
  std::vector<Work> take() { return std::move(work_); }

 protected:
  Tensor values(const Shape& shape, DType dtype) const;
  Tensor room(const Shape& shape, DType dtype) const { return Tensor::empty(shape, dtype, e_.device); }
  Tensor tokens(DType dtype) const { return values({e_.B, e_.N, e_.C}, dtype); }
  void add(const std::string& name, double bytes, double flops, std::function<void()> call) {
    work_.push_back({name, bytes, flops, std::move(call)});
  }
  double width(DType dtype) const { return static_cast<double>(size_of(dtype)); }
  bool on_gpu() const { return e_.device.kind == DeviceKind::cuda; }

  Extents e_;

 private:
  std::shared_ptr<DrawnValues> drawn_;
  std::vector<Work> work_;
};

/// What a ViT's step with one of the shipped policies does not run: losses, targets, other codes, and the kernels of Swin and ResNet.
std::vector<Work> further_kernels(const Extents& e, std::shared_ptr<DrawnValues> drawn);

}  // namespace mesa
