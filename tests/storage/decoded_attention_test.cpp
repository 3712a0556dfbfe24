// The gradient of attention from decoded q, k and v: which source of its rows errs least. `mesa-tests -s "decoded attention*"` prints the errors.
#include <catch2/catch.hpp>
#include <cmath>

#include "mesa/kernels/attention.h"
#include "mesa/kernels/elementwise.h"
#include "support/tiny_vit.h"

using namespace mesa;
using namespace mesa::testing;

namespace {

constexpr int64_t B = 8, N = 197, H = 3, D = 64;

Tensor third(const Tensor& packed, int i) { return packed.narrow(-1, i * H * D, H * D); }

Tensor drawn(const Shape& shape, double spread, const char* name) {
  RandomStream random(RandomKey::of(1, name, 0));
  std::vector<float> values(shape.numel());
  for (float& v : values) v = static_cast<float>(spread * random.normal());
  return Tensor::from<float>(shape, values);
}

}  // namespace

TEST_CASE("decoded attention: normalizing the rows again errs less than the saved log-sum-exp") {
  const double spread = GENERATE(1.0, 2.0), scale = 1 / std::sqrt(static_cast<double>(D));
  const Tensor qkv = drawn({B, N, 3 * H * D}, spread, "qkv"), d_o = drawn({B, N, H * D}, 1, "d_o");
  const Tensor o = Tensor::empty({B, N, H * D}, DType::f32), lse = Tensor::empty({B, H, N}, DType::f32);
  kernels::attention(third(qkv, 0), third(qkv, 1), third(qkv, 2), H, scale, o, lse);
  const auto gradient = [&](const Tensor& x, const Tensor& output, const Tensor& rows) {
    const Tensor g = Tensor::empty(qkv.shape(), DType::f32);
    kernels::attention_grad(d_o, {third(x, 0), {}}, {third(x, 1), {}}, {third(x, 2), {}}, output, rows, H, scale, third(g, 0), third(g, 1),
                            third(g, 2));
    return g.to_vector<double>();
  };
  const std::vector<double> exact = gradient(qkv, o, lse);
  const auto error = [&](const std::vector<double>& g) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < g.size(); ++i) difference += (g[i] - exact[i]) * (g[i] - exact[i]), size += exact[i] * exact[i];
    return std::sqrt(difference / size);
  };
  CHECK(error(gradient(qkv, Tensor(), Tensor())) < 1e-5);  // nothing decoded: the ways agree
  for (const char* codec : {"int8", "int4", "int2"}) {
    const char* rounding = std::string(codec) == "int8" ? "nearest" : "stochastic";
    StoragePolicy policy = simple_policy({{"*", codec, {{"groups", "256"}, {"rounding", rounding}}, ""}});
    policy.begin(1, 1);
    const Tensor x = policy.save(qkv, {"attention", "x"}, nullptr).get(), decoded_o = policy.save(o, {"attention", "o"}, nullptr).get();
    CAPTURE(spread, codec);
    const double again = error(gradient(x, Tensor(), Tensor()));
    CHECK(again < error(gradient(x, decoded_o, lse)));
    CHECK(again < error(gradient(x, Tensor(), lse)));
  }
}
