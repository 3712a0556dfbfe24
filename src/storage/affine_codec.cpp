// Affine codes of 8, 4 or 2 bits: q = clamp(floor((x - offset) / step + u), 0, 2^bits - 1), decoded as offset + q step
// (Pan et al. 2021, arXiv 2111.11124; both ends are clamped and the scale travels with the codes, which their code does not do).
#include <cstdlib>

#include "builtin_codecs.h"
#include "mesa/kernels/elementwise.h"

namespace mesa {
namespace {

using kernels::GroupLayout;

struct Settings {
  int bits = 8;
  enum class Groups { heads, layer, channel, count } groups = Groups::count;
  int64_t count = 256;
  bool running = false;
  double decay = 0.9;
  bool stochastic = true;
};

std::string read_choice(const CodecOptions& options, const std::string& key, const std::vector<std::string>& choices) {
  const auto found = options.find(key);
  if (found == options.end()) return choices[0];
  const bool known = std::find(choices.begin(), choices.end(), found->second) != choices.end();
  check(known, key, " is '", found->second, "'; it may be ", choices[0], " or ", choices[1]);
  return found->second;
}

Settings read_settings(int bits, const CodecOptions& options) {
  Settings s;
  s.bits = bits;
  if (const auto found = options.find("groups"); found != options.end()) {
    const std::string& text = found->second;
    if (text == "heads") s.groups = Settings::Groups::heads;
    else if (text == "layer") s.groups = Settings::Groups::layer;
    else if (text == "channel") s.groups = Settings::Groups::channel;
    else {
      char* end = nullptr;
      s.count = std::strtoll(text.c_str(), &end, 10);
      check(!text.empty() && *end == 0 && s.count >= 8 && s.count <= (1 << 20), "groups is '", text,
            "'; it may be heads, layer, channel or a number of consecutive elements from 8 to 1,048,576");
    }
  }
  s.running = read_choice(options, "range", {"current", "running"}) == "running";
  s.stochastic = read_choice(options, "rounding", {"stochastic", "nearest"}) == "stochastic";
  if (const auto found = options.find("decay"); found != options.end()) {
    char* end = nullptr;
    s.decay = std::strtod(found->second.c_str(), &end);
    check(!found->second.empty() && *end == 0 && s.decay >= 0 && s.decay < 1, "decay is '", found->second, "'; it must lie in [0, 1)");
    check(s.running, "decay belongs to range: running");
  }
  check(!s.running || s.groups != Settings::Groups::count,
        "range: running needs groups: heads, layer or channel (a run of consecutive elements is a different one in every batch size)");
  return s;
}

GroupLayout layout_of(const Settings& s, const Shape& shape, const Site& site) {
  const int64_t n = shape.numel();
  const int64_t channels = shape.rank() == 0 ? 1 : shape[-1];
  switch (s.groups) {
    case Settings::Groups::layer: return {1, 1, n, false};
    case Settings::Groups::channel: return {channels == 0 ? 0 : n / channels, channels, 1, false};
    case Settings::Groups::count: return {1, (n + s.count - 1) / s.count, s.count, true};
    case Settings::Groups::heads: break;
  }
  if (shape.rank() == 4) return {shape[0], shape[1], shape[2] * shape[3], false};  // [B, H, N, D]
  check(channels % site.heads == 0, "groups: heads needs channels that divide by the ", site.heads, " heads, not ", channels, " at ", site.name());
  return {channels == 0 ? 0 : n / channels, site.heads, channels / site.heads, false};
}

class AffineCodec : public Codec {
 public:
  explicit AffineCodec(const Settings& settings) : s_(settings) {}

  Packed pack(const Tensor& input, const PackContext& context) override {
    const Tensor x = uniform(input);
    Packed packed{{}, x.shape(), x.dtype(), layout_of(s_, x.shape(), context.site)};
    const int64_t groups = packed.layout.groups;
    const Tensor codes = Tensor::empty({code_bytes(x.numel())}, DType::u8, x.device());
    const Tensor step = Tensor::empty({groups}, DType::f32, x.device());
    const Tensor offset = Tensor::empty({groups}, DType::f32, x.device());
    if (!s_.running) {
      kernels::quantize_current(x, packed.layout, s_.bits, s_.stochastic, context.random, step, offset, codes, context.counts);
    } else {
      pack_running(x, packed.layout, context, step, offset, codes);
    }
    packed.parts = {codes, step, offset};
    return packed;
  }

  Tensor unpack(const Packed& packed) const override {
    const Tensor x = Tensor::empty(packed.shape, packed.dtype, packed.parts[0].device());
    kernels::dequantize(packed.parts[0], packed.layout, s_.bits, packed.parts[1], packed.parts[2], x);
    return x;
  }

  std::optional<kernels::Coded> coded(const Packed& packed) const override {
    return kernels::Coded{packed.parts[0], packed.parts[1], packed.parts[2], packed.layout, s_.bits};
  }

  int64_t packed_bytes(const Shape& shape, DType, const Site& site) const override {
    return code_bytes(shape.numel()) + 8 * layout_of(s_, shape, site).groups;
  }

  double error_bound(double lo, double hi) const override {
    const double step = (hi - lo) / ((1 << s_.bits) - 1);
    const double arithmetic = 1e-6 * std::max(std::abs(lo), std::abs(hi)) + 1e-4 * step;  // fp32 rounding of the formula itself
    return (s_.stochastic ? step : step / 2) + arithmetic;
  }

  std::map<std::string, Tensor> state() const override {
    if (!alpha_.defined()) return {};
    return {{"alpha", alpha_}, {"beta", beta_}};
  }

  void load_state(const std::map<std::string, Tensor>& state) override {
    check(s_.running && state.count("alpha") && state.count("beta"), "the checkpoint's storage state is not the running range of this codec");
    const Tensor &alpha = state.at("alpha"), &beta = state.at("beta");
    check(alpha.dtype() == DType::f32 && beta.dtype() == DType::f32 && alpha.rank() == 1 && alpha.shape() == beta.shape(),
          "the checkpoint's running range has the wrong form");
    alpha_ = own_copy(alpha);  // moved to the tensors' device when the first of them comes
    beta_ = own_copy(beta);
  }

 private:
  int64_t code_bytes(int64_t elements) const { return (elements * s_.bits + 7) / 8; }

  /// Updates must not reach the tensors of whoever handed the state over (another policy, a checkpoint in memory).
  static Tensor own_copy(const Tensor& x) {
    const Tensor y = Tensor::empty(x.shape(), x.dtype(), x.device(), MemoryKind::optimizer);
    transfer(x, y);
    return y;
  }

  static Tensor uniform(const Tensor& x) {
    if (x.has_uniform_rows()) return x;
    const Tensor y = empty_like(x);
    kernels::copy(x, y);
    return y;
  }

  /// The range is known before the tensor is (except at the first call, which calibrates): one pass packs and measures the next one.
  void pack_running(const Tensor& x, const GroupLayout& layout, const PackContext& context, const Tensor& step, const Tensor& offset,
                    const Tensor& codes) {
    const Tensor lo = empty_like(step), hi = empty_like(step);
    const bool first = !alpha_.defined();
    if (first) {
      alpha_ = Tensor::empty(step.shape(), DType::f32, x.device(), MemoryKind::optimizer);
      beta_ = Tensor::empty(step.shape(), DType::f32, x.device(), MemoryKind::optimizer);
      kernels::fill(alpha_, 0);
      kernels::fill(beta_, 0);
      kernels::group_range(x, layout, lo, hi, Tensor());  // quantize counts the elements that are not finite
      kernels::update_range(alpha_, beta_, lo, hi, 0.0);
    }
    alpha_ = to(alpha_, x.device(), MemoryKind::optimizer);
    beta_ = to(beta_, x.device(), MemoryKind::optimizer);
    check(alpha_.shape() == step.shape(), "the running range of ", context.site.name(), " has ", alpha_.numel(), " groups but the tensor has ",
          step.numel());
    kernels::freeze_range(alpha_, beta_, s_.bits, step, offset);
    kernels::quantize(x, layout, s_.bits, s_.stochastic, context.random, step, offset, codes, lo, hi, context.counts);
    if (!first) kernels::update_range(alpha_, beta_, lo, hi, s_.decay);
  }

  Settings s_;
  Tensor alpha_, beta_;  // running range r and minimum m of each group, f32: half precision would stagnate
};

}  // namespace

std::unique_ptr<Codec> make_affine_codec(int bits, const CodecOptions& options) {
  return std::make_unique<AffineCodec>(read_settings(bits, options));
}

}  // namespace mesa
