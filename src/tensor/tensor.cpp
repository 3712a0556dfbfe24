#include "mesa/tensor/tensor.h"

#include "mesa/base/cuda.h"

namespace mesa {

namespace {
Shape contiguous_strides(const Shape& shape) {
  Shape strides = shape;
  int64_t step = 1;
  for (int i = shape.rank() - 1; i >= 0; --i) {
    strides[i] = step;
    step *= shape[i] == 0 ? 1 : shape[i];
  }
  return strides;
}

int checked_axis(const Shape& shape, int axis) {
  const int a = axis < 0 ? axis + shape.rank() : axis;
  check(a >= 0 && a < shape.rank(), "axis ", axis, " of a tensor of shape ", shape);
  return a;
}
}  // namespace

Tensor Tensor::empty(const Shape& shape, DType dtype, Device device, MemoryKind kind) {
  Tensor out;
  out.numel_ = shape.numel();
  out.shape_ = shape;
  out.strides_ = contiguous_strides(shape);
  out.dtype_ = dtype;
  int64_t bytes = 0;
  check(!__builtin_mul_overflow(out.numel_, size_of(dtype), &bytes), "a tensor of shape ", shape, " is too large");
  out.buffer_ = Allocator::of(device).allocate(bytes, kind);
  return out;
}

Tensor Tensor::zeros(const Shape& shape, DType dtype, Device device, MemoryKind kind) {
  Tensor out = empty(shape, dtype, device, kind);
  clear(out);
  return out;
}

bool Tensor::is_contiguous() const {
  if (numel_ == 0) return true;
  int64_t step = 1;
  for (int i = rank() - 1; i >= 0; --i) {
    if (shape_[i] != 1 && strides_[i] != step) return false;
    step *= shape_[i];
  }
  return true;
}

bool Tensor::has_uniform_rows() const {
  if (rank() == 0 || numel_ == 0) return true;
  if (shape_[-1] != 1 && strides_[-1] != 1) return false;
  int64_t step = -1;  // unknown until the first axis of extent > 1
  for (int i = rank() - 2; i >= 0; --i) {
    if (shape_[i] == 1) continue;
    if (step != -1 && strides_[i] != step) return false;
    step = strides_[i] * shape_[i];
  }
  return true;
}

int64_t Tensor::row_stride() const {
  for (int i = rank() - 2; i >= 0; --i)
    if (shape_[i] != 1) return strides_[i];
  return rank() == 0 ? 1 : shape_[-1];
}

Tensor Tensor::reshape(const Shape& shape) const {
  check(is_contiguous(), "reshape of a strided tensor of shape ", shape_);
  check(shape.numel() == numel_, "cannot reshape ", shape_, " to ", shape);
  Tensor out = *this;
  out.shape_ = shape;
  out.strides_ = contiguous_strides(shape);
  return out;
}

Tensor Tensor::transpose(int a, int b) const {
  a = checked_axis(shape_, a);
  b = checked_axis(shape_, b);
  Tensor out = *this;
  std::swap(out.shape_[a], out.shape_[b]);
  std::swap(out.strides_[a], out.strides_[b]);
  return out;
}

Tensor Tensor::narrow(int axis, int64_t from, int64_t count) const {
  axis = checked_axis(shape_, axis);
  check(from >= 0 && count >= 0 && from + count <= shape_[axis], "elements ", from, " to ", from + count, " of axis ", axis, " of ", shape_);
  Tensor out = *this;
  out.shape_[axis] = count;
  out.offset_ += from * strides_[axis];
  out.numel_ = out.shape_.numel();
  return out;
}

Tensor Tensor::select(int axis, int64_t index) const {
  axis = checked_axis(shape_, axis);
  Tensor out = narrow(axis, index, 1);
  out.shape_ = out.shape_.without(axis);
  out.strides_ = out.strides_.without(axis);
  return out;
}

Tensor Tensor::split_last(int64_t inner) const {
  check(rank() >= 1 && rank() < Shape::kMaxRank && inner > 0 && dim(-1) % inner == 0, "cannot split the last axis of ", shape_, " by ", inner);
  int64_t dims[Shape::kMaxRank], steps[Shape::kMaxRank];
  for (int i = 0; i < rank(); ++i) dims[i] = shape_[i], steps[i] = strides_[i];
  dims[rank() - 1] = dim(-1) / inner;
  steps[rank() - 1] = strides_[-1] * inner;
  dims[rank()] = inner;
  steps[rank()] = strides_[-1];
  Tensor out = *this;
  out.shape_ = Shape(dims, rank() + 1);
  out.strides_ = Shape(steps, rank() + 1);
  return out;
}

Tensor Tensor::as_strided(const Shape& shape, const Shape& strides, int64_t offset) const {
  Tensor out = *this;
  out.shape_ = shape;
  out.strides_ = strides;
  out.offset_ = offset;
  out.numel_ = shape.numel();
  check(offset >= 0, "a view that begins at ", offset);
  int64_t last = offset;
  for (int i = 0; i < shape.rank(); ++i) last += (shape[i] - 1) * strides[i];
  check(out.numel_ == 0 || (last + 1) * size_of(dtype_) <= buffer_->bytes(), "a view of shape ", shape, " leaves its buffer");
  return out;
}

void clear(const Tensor& x) {
  check(x.is_contiguous(), "a strided tensor of shape ", x.shape(), " cannot be cleared");
  if (x.is_meta() || x.numel() == 0) return;
  if (x.device().kind == DeviceKind::cuda) cuda::clear(x.raw(), x.bytes());
  else std::memset(x.raw(), 0, x.bytes());
}

void transfer(const Tensor& from, const Tensor& to) {
  check(from.shape() == to.shape() && from.dtype() == to.dtype() && from.is_contiguous() && to.is_contiguous(), "a transfer from ",
        from.shape(), " ", to_string(from.dtype()), " to ", to.shape(), " ", to_string(to.dtype()), ": both must be alike and contiguous");
  if (from.is_meta() || to.is_meta() || from.numel() == 0) return;
  const bool from_gpu = from.device().kind == DeviceKind::cuda, to_gpu = to.device().kind == DeviceKind::cuda;
  if (from_gpu && to_gpu) cuda::copy_on_device(to.raw(), from.raw(), from.bytes());
  else if (from_gpu) cuda::copy_to_host(to.raw(), from.raw(), from.bytes());
  else if (to_gpu) cuda::copy_to_device(to.raw(), from.raw(), from.bytes());
  else std::memcpy(to.raw(), from.raw(), from.bytes());
}

Tensor to(const Tensor& x, Device device, MemoryKind kind) {
  if (!x.defined() || x.device() == device) return x;
  if (x.is_contiguous()) {
    const Tensor out = Tensor::empty(x.shape(), x.dtype(), device, kind);
    transfer(x, out);
    return out;
  }
  int64_t span = 1;  // from the first element to the last
  for (int i = 0; i < x.rank(); ++i) span += (x.dim(i) - 1) * x.strides()[i];
  const Tensor whole = to(x.as_strided({span}, {1}, x.offset()), device, kind);
  return whole.as_strided(x.shape(), x.strides(), 0);
}

template <class T>
std::vector<T> Tensor::to_vector() const {
  if (device().kind == DeviceKind::cuda) return to(*this, kCpu).to_vector<T>();
  check(device().kind == DeviceKind::cpu, "to_vector needs a tensor with memory, not one on ", to_string(device().kind));
  std::vector<T> out;
  out.reserve(numel_);
  const auto visit = [&](auto tag) {
    using S = decltype(tag);
    const S* base = data<S>();
    for (int64_t i = 0; i < numel_; ++i) {
      int64_t rest = i, at = 0;
      for (int axis = rank() - 1; axis >= 0; --axis) {
        at += rest % shape_[axis] * strides_[axis];
        rest /= shape_[axis];
      }
      out.push_back(static_cast<T>(base[at]));
    }
  };
  if constexpr (std::is_integral_v<T>) visit(T{});
  else dispatch_float(dtype_, visit);
  return out;
}

template std::vector<float> Tensor::to_vector<float>() const;
template std::vector<double> Tensor::to_vector<double>() const;
template std::vector<uint8_t> Tensor::to_vector<uint8_t>() const;
template std::vector<int32_t> Tensor::to_vector<int32_t>() const;
template std::vector<int64_t> Tensor::to_vector<int64_t>() const;

}  // namespace mesa
