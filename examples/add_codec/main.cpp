// A codec of one's own: one bit an element and one scale a run, registered beside the built-in ones and used by a storage rule.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "mesa/models/vit.h"
#include "mesa/optim/adamw.h"

using namespace mesa;

namespace {

/// x is kept as its sign and, for each run of `count` consecutive elements, the mean of |x|: 1 + 32 / count bits an element.
class SignCodec : public Codec {
 public:
  explicit SignCodec(int64_t count) : count_(count) {}

  Packed pack(const Tensor& x, const PackContext& context) override {
    const std::vector<float> values = x.to_vector<float>();  // any strides, any floating dtype
    const int64_t n = x.numel(), runs = (n + count_ - 1) / count_;
    const Tensor bits = Tensor::zeros({(n + 7) / 8}, DType::u8), scales = Tensor::zeros({runs}, DType::f32);
    for (int64_t i = 0; i < n; ++i) {
      if (!std::isfinite(values[i])) {
        ++context.counts.data<int64_t>()[1];  // a bad value must not hide in a code
        continue;
      }
      if (values[i] > 0) bits.data<uint8_t>()[i / 8] |= static_cast<uint8_t>(1 << i % 8);
      scales.data<float>()[i / count_] += std::abs(values[i]) / static_cast<float>(std::min(count_, n - i / count_ * count_));
    }
    return {{bits, scales}, x.shape(), x.dtype(), {}};
  }

  Tensor unpack(const Packed& packed) const override {
    std::vector<float> values(packed.shape.numel());
    for (size_t i = 0; i < values.size(); ++i) {
      const float scale = packed.parts[1].data<float>()[i / count_];
      values[i] = packed.parts[0].data<uint8_t>()[i / 8] >> i % 8 & 1 ? scale : -scale;
    }
    const Tensor x = Tensor::empty(packed.shape, packed.dtype);
    dispatch_float(packed.dtype, [&](auto tag) {
      for (size_t i = 0; i < values.size(); ++i) x.data<decltype(tag)>()[i] = static_cast<decltype(tag)>(values[i]);
    });
    return x;
  }

  int64_t packed_bytes(const Shape& shape, DType, const Site&) const override {
    return (shape.numel() + 7) / 8 + (shape.numel() + count_ - 1) / count_ * 4;
  }

  /// The scale lies between 0 and the largest |x|, and so does |x|: they never differ by more.
  double error_bound(double lo, double hi) const override { return std::max(std::abs(lo), std::abs(hi)); }

 private:
  int64_t count_;
};

std::unique_ptr<Codec> make_sign_codec(const CodecOptions& options) {
  const auto found = options.find("groups");
  const int64_t count = found == options.end() ? 32 : std::atoll(found->second.c_str());
  check(count > 0, "groups is '", found->second, "'; it must be a number of consecutive elements");
  return std::make_unique<SignCodec>(count);
}

/// Trains a small vision transformer on random images and returns the last loss; tells what the policy keeps.
float train(StoragePolicy& policy, int64_t& kept, int64_t& exact) {
  VitConfig config;
  config.image_size = 16, config.patch_size = 4, config.width = 48, config.depth = 2, config.heads = 3, config.classes = 4;
  ParamStore store;
  const Vit model(Builder(store, 1), config);
  store.allocate_gradients();
  AdamW optimizer(store.params(), {});
  RandomStream random(RandomKey::of(1, "images", 0));
  std::vector<float> pixels(8 * 3 * 16 * 16);
  for (float& p : pixels) p = static_cast<float>(random.normal());
  const Tensor images = Tensor::from<float>({8, 3, 16, 16}, pixels, MemoryKind::inputs);
  const Tensor labels = Tensor::from<int64_t>({8}, {0, 1, 2, 3, 0, 1, 2, 3}, MemoryKind::inputs);

  float last = 0;
  for (int step = 0; step < 40; ++step) {
    store.clear_gradients();
    Tape tape(policy, 1, step);
    const Var loss = cross_entropy(model(images), labels);
    tape.backward(loss);
    optimizer.step(1e-3);
    last = loss.value().data<float>()[0];
  }
  kept = exact = 0;
  for (const SiteRecord& site : policy.sites()) kept += site.kept_bytes, exact += site.exact_bytes;
  return last;
}

}  // namespace

int main() {
  try {
    register_codec("sign", {"groups"}, make_sign_codec);
    StoragePolicy policy("sign for normalized values", {{"*", "int8", {}, ""}, {"*:xhat", "sign", {{"groups", "16"}}, ""}});
    int64_t kept = 0, exact = 0;
    const float loss = train(policy, kept, exact);
    policy.check_rules_matched();
    for (const SiteRecord& site : policy.sites())
      std::printf("%-32s %-10s %8lld of %8lld bytes\n", site.site.name().c_str(), site.codec.c_str(),
                  static_cast<long long>(site.kept_bytes), static_cast<long long>(site.exact_bytes));
    std::printf("kept %s of %s an iteration; loss after 40 steps %.3f (it began near %.3f)\n", format_bytes(kept).c_str(),
                format_bytes(exact).c_str(), static_cast<double>(loss), std::log(4.0));
    return kept * 3 < exact && loss < 0.7f ? 0 : 1;
  } catch (const Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
