// A strided view of a buffer: a cheap value to pass around, like a pointer with a shape.
#pragma once
#include <cstring>
#include <vector>

#include "mesa/base/dtype.h"
#include "mesa/base/shape.h"
#include "mesa/tensor/memory.h"

namespace mesa {

class Tensor {
 public:
  Tensor() = default;
  /// Uninitialized, contiguous.
  static Tensor empty(const Shape& shape, DType dtype, Device device = kCpu, MemoryKind kind = MemoryKind::workspace);
  static Tensor zeros(const Shape& shape, DType dtype, Device device = kCpu, MemoryKind kind = MemoryKind::workspace);
  /// A CPU tensor holding a copy of `values` (numel must match).
  template <class T>
  static Tensor from(const Shape& shape, const std::vector<T>& values, MemoryKind kind = MemoryKind::workspace);

  bool defined() const { return buffer_ != nullptr; }
  const Shape& shape() const { return shape_; }
  const Shape& strides() const { return strides_; }  ///< in elements
  int rank() const { return shape_.rank(); }
  int64_t dim(int i) const { return shape_[i]; }
  int64_t numel() const { return numel_; }
  int64_t bytes() const { return numel_ * size_of(dtype_); }
  DType dtype() const { return dtype_; }
  Device device() const { return buffer_->device(); }
  bool is_meta() const { return device().kind == DeviceKind::meta; }
  int64_t offset() const { return offset_; }  ///< first element, in elements from the buffer's start
  const std::shared_ptr<Buffer>& buffer() const { return buffer_; }
  bool is_contiguous() const;
  /// True if the tensor is rows of `dim(-1)` contiguous elements at one constant distance (row_stride).
  bool has_uniform_rows() const;
  int64_t row_stride() const;
  int64_t rows() const { return rank() == 0 ? 1 : (dim(-1) == 0 ? 0 : numel_ / dim(-1)); }

  /// The elements; T must be the dtype. The handle is const, the memory is not.
  template <class T>
  T* data() const {
    check(defined() && dtype_of<T> == dtype_, "a tensor of ", to_string(dtype_), " was read as ", to_string(dtype_of<T>));
    return static_cast<T*>(buffer_->data()) + offset_;
  }
  void* raw() const { return static_cast<char*>(buffer_->data()) + offset_ * size_of(dtype_); }

  // Views: the same buffer, other extents.
  Tensor reshape(const Shape& shape) const;  ///< of a contiguous tensor; one extent may be inferred by reshape_infer in callers
  Tensor transpose(int a, int b) const;
  Tensor narrow(int axis, int64_t from, int64_t count) const;
  Tensor select(int axis, int64_t index) const;  ///< removes the axis
  Tensor split_last(int64_t inner) const;        ///< [.., C] -> [.., C / inner, inner], any strides
  /// Any strides over the same buffer (bounds are checked against the buffer).
  Tensor as_strided(const Shape& shape, const Shape& strides, int64_t offset) const;

  /// Copies a tensor (any strides) out as T, converting from any floating dtype; integer dtypes only to themselves.
  template <class T>
  std::vector<T> to_vector() const;

 private:
  std::shared_ptr<Buffer> buffer_;
  Shape shape_, strides_;
  int64_t offset_ = 0;
  int64_t numel_ = 0;
  DType dtype_ = DType::f32;
};

/// Sets the bytes of a contiguous tensor to 0, wherever it lives.
void clear(const Tensor& x);
/// Copies elements between devices, or on one: both contiguous, of one shape and dtype. Memory of kPinned must not be reused before the device is waited for.
void transfer(const Tensor& from, const Tensor& to);
/// x itself if it lives there, otherwise a copy; a strided x stays strided.
Tensor to(const Tensor& x, Device device, MemoryKind kind = MemoryKind::workspace);

inline Tensor empty_like(const Tensor& x) { return Tensor::empty(x.shape(), x.dtype(), x.device()); }
inline Tensor empty_like(const Tensor& x, DType dtype) { return Tensor::empty(x.shape(), dtype, x.device()); }

template <class T>
Tensor Tensor::from(const Shape& shape, const std::vector<T>& values, MemoryKind kind) {
  Tensor out = empty(shape, dtype_of<T>, kCpu, kind);
  check(out.numel() == static_cast<int64_t>(values.size()), "a tensor of shape ", shape, " cannot hold ", values.size(), " values");
  if (!values.empty()) std::memcpy(out.raw(), values.data(), values.size() * sizeof(T));
  return out;
}

}  // namespace mesa
