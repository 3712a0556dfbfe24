// exact: the tensor itself. bf16: rounded to 16 bits, relative error at most 2^-8 (half a unit of an 8-bit significand).
#include <algorithm>
#include <cmath>

#include "builtin_codecs.h"
#include "mesa/kernels/elementwise.h"

namespace mesa {
namespace {

class ExactCodec : public Codec {
 public:
  Packed pack(const Tensor& x, const PackContext&) override { return {{x}, x.shape(), x.dtype(), {}}; }
  Tensor unpack(const Packed& packed) const override { return packed.parts[0]; }
  int64_t packed_bytes(const Shape& shape, DType dtype, const Site&) const override { return shape.numel() * size_of(dtype); }
  double error_bound(double, double) const override { return 0; }
  bool shares_input(DType) const override { return true; }
};

class Bf16Codec : public Codec {
 public:
  Packed pack(const Tensor& x, const PackContext& context) override {
    if (x.dtype() == DType::bf16) return {{x}, x.shape(), x.dtype(), {}};
    const Tensor codes = empty_like(x, DType::bf16);
    kernels::copy(x, codes);
    kernels::count_nonfinite(codes, context.counts);
    return {{codes}, x.shape(), x.dtype(), {}};
  }
  Tensor unpack(const Packed& packed) const override {
    const Tensor& codes = packed.parts[0];
    if (codes.dtype() == packed.dtype) return codes;
    const Tensor x = Tensor::empty(packed.shape, packed.dtype, codes.device());
    kernels::copy(codes, x);
    return x;
  }
  int64_t packed_bytes(const Shape& shape, DType, const Site&) const override { return shape.numel() * 2; }
  double error_bound(double lo, double hi) const override { return std::max(std::abs(lo), std::abs(hi)) * 0x1p-8; }
  bool shares_input(DType dtype) const override { return dtype == DType::bf16; }
};

}  // namespace

std::unique_ptr<Codec> make_exact_codec() { return std::make_unique<ExactCodec>(); }
std::unique_ptr<Codec> make_bf16_codec() { return std::make_unique<Bf16Codec>(); }

}  // namespace mesa
