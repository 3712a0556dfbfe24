#include "mesa/base/shape.h"

#include <algorithm>
#include <ostream>

#include "mesa/base/error.h"

namespace mesa {

Shape::Shape(std::initializer_list<int64_t> dims) : Shape(dims.begin(), static_cast<int>(dims.size())) {}

Shape::Shape(const int64_t* dims, int rank) : rank_(rank) {
  check(rank <= kMaxRank, "a shape has at most ", kMaxRank, " extents, not ", rank);
  for (int i = 0; i < rank; ++i) {
    check(dims[i] >= 0, "extent ", i, " of a shape is negative: ", dims[i]);
    dims_[i] = dims[i];
  }
}

int64_t Shape::numel() const {
  int64_t n = 1;
  for (int64_t d : *this) check(!__builtin_mul_overflow(n, d, &n), "the shape ", *this, " has more than 2^63 elements");
  return n;
}

bool Shape::operator==(const Shape& other) const {
  return rank_ == other.rank_ && std::equal(begin(), end(), other.begin());
}

Shape Shape::without(int axis) const {
  Shape out = *this;
  if (axis < 0) axis += rank_;
  std::copy(dims_.begin() + axis + 1, dims_.begin() + rank_, out.dims_.begin() + axis);
  --out.rank_;
  return out;
}

Shape Shape::with(int axis, int64_t extent) const {
  Shape out = *this;
  out[axis] = extent;
  return out;
}

std::string to_string(const Shape& shape) {
  std::string out = "[";
  for (int i = 0; i < shape.rank(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

std::ostream& operator<<(std::ostream& out, const Shape& shape) { return out << to_string(shape); }

}  // namespace mesa
