// Affine codes of 8, 4 or 2 bits: q = clamp(floor((x - offset) / step + u), 0, 2^bits - 1), decoded as offset + q step
// (Pan et al. 2021, arXiv 2111.11124; both ends are clamped and the scale travels with the codes, which their code does not do).
#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <utility>

#include "builtin_codecs.h"
#include "mesa/kernels/codec_scalar.h"
#include "mesa/kernels/elementwise.h"

namespace mesa {
namespace {

using kernels::GroupLayout;

struct Settings {
  int bits = 8;
  enum class Groups { heads, layer, channel, channels, count } groups = Groups::count;
  int64_t count = 256;  ///< elements of a run, or channels of a block
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
    if (text == "heads")
      s.groups = Settings::Groups::heads;
    else if (text == "layer")
      s.groups = Settings::Groups::layer;
    else if (text == "channel")
      s.groups = Settings::Groups::channel;
    else {
      char* end = nullptr;
      s.count = std::strtoll(text.c_str(), &end, 10);
      const std::string unit = end;
      s.groups = unit == " channels" ? Settings::Groups::channels : Settings::Groups::count;
      check(
          !text.empty() && (unit.empty() ? s.count >= 8 && s.count <= (1 << 20) : unit == " channels" && s.count >= 1 && s.count <= 65536),
          "groups is '", text, "'; it may be heads, layer, channel, 'N channels', or a number of consecutive elements from 8 to 1,048,576");
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
        "range: running needs groups: heads, layer, channel or 'N channels' (a run of consecutive elements is a different one in every "
        "batch size)");
  return s;
}

GroupLayout layout_of(const Settings& s, const Shape& shape, const Site& site) {
  const int64_t n = shape.numel();
  const int64_t channels = shape.rank() == 0 ? 1 : shape[-1];
  switch (s.groups) {
    case Settings::Groups::layer: return {1, 1, n, false};
    case Settings::Groups::channel: return {channels == 0 ? 0 : n / channels, channels, 1, false};
    case Settings::Groups::channels: {
      if (shape.rank() == 4) break;
      const int64_t block = std::gcd(s.count, channels);
      return {channels == 0 ? 0 : n / channels, channels == 0 ? 0 : channels / block, block, false};
    }
    case Settings::Groups::count: return {1, (n + s.count - 1) / s.count, s.count, true};
    case Settings::Groups::heads: break;
  }
  if (shape.rank() == 4) return {shape[0], shape[1], shape[2] * shape[3], false};  // [B, H, N, D]
  check(channels % site.heads == 0, "groups: heads needs channels that divide by the ", site.heads, " heads, not ", channels, " at ",
        site.name());
  return {channels == 0 ? 0 : n / channels, site.heads, channels / site.heads, false};
}

class AffineCodec : public Codec {
 public:
  explicit AffineCodec(const Settings& settings) : s_(settings) {}

  Packed pack(const Tensor& input, const PackContext& context) override {
    const Tensor x = uniform(input);
    if (s_.running) return pack_running(x, context);
    const Packed packed = room_for(x.shape(), x.dtype(), x.device(), context.site);
    kernels::encode(x, coding(packed, context));
    return packed;
  }

  Opened open(const Shape& shape, DType dtype, Device device, const PackContext& context) override {
    const bool planned = device.kind == DeviceKind::meta;  // a plan is of any step but the first
    if (s_.running && !latest_.defined() && !planned) return {};
    const Packed packed = room_for(shape, dtype, device, context.site);
    return s_.running ? running_codes(packed, device, context) : Opened{packed, coding(packed, context)};
  }

  Tensor unpack(const Packed& packed) const override {
    const Tensor x = Tensor::empty(packed.shape, packed.dtype, packed.parts[0].device());
    kernels::dequantize(packed.parts[0], packed.layout, s_.bits, packed.parts[1], packed.parts[2], x);
    return x;
  }

  std::optional<kernels::Coded> coded(const Packed& packed) const override {
    if (packed.parts[0].is_meta()) return kernels::Coded{packed.parts[0], {}, {}, packed.layout, s_.bits};  // a plan has no scales
    return kernels::Coded{packed.parts[0], packed.parts[1], packed.parts[2], packed.layout, s_.bits};
  }

  int64_t packed_bytes(const Shape& shape, DType, const Site& site) const override {
    return code_bytes(shape.numel()) + 8 * layout_of(s_, shape, site).groups;
  }

  double error_bound(double lo, double hi) const override {
    // A range too small to divide by counts as constant: all of it decodes as lo.
    const bool constant = kernels::step_of_range(static_cast<float>(lo), static_cast<float>(hi), s_.bits) == 0;
    const double step = constant ? hi - lo : (hi - lo) / ((1 << s_.bits) - 1);
    const double arithmetic = 1e-6 * std::max(std::abs(lo), std::abs(hi)) + 1e-4 * step;  // fp32 rounding of the formula itself
    return (s_.stochastic || constant ? step : step / 2) + arithmetic;
  }

  std::map<std::string, Tensor> state() const override {
    if (!latest_.defined()) return {};
    return {{"alpha", latest_.alpha}, {"beta", latest_.beta}};
  }

  // No copy, and nothing for a device to do: the estimates of an update that may turn out bad are written beside the good ones.
  void commit() override {
    if (!is_committed()) spare_ = std::exchange(committed_, latest_);
  }
  void roll_back() override {
    if (!is_committed()) spare_ = std::exchange(latest_, committed_);
  }

  uint64_t phase() const override {
    const auto id = [](const Range& range) { return range.defined() ? range.alpha.buffer()->id() : 0; };
    return mix64(id(latest_) ^ mix64(id(is_committed() ? spare_ : latest_)));
  }
  void repeat() override {
    if (is_committed() && spare_.defined()) latest_ = std::exchange(spare_, {});  // as next_range did; a first call leaves it there, too
  }

  void load_state(const std::map<std::string, Tensor>& state) override {
    check(s_.running && state.count("alpha") && state.count("beta"),
          "the checkpoint's storage state is not the running range of this codec");
    const Tensor &alpha = state.at("alpha"), &beta = state.at("beta");
    check(alpha.dtype() == DType::f32 && beta.dtype() == DType::f32 && alpha.rank() == 1 && alpha.shape() == beta.shape(),
          "the checkpoint's running range has the wrong form");
    latest_ = committed_ = {own_copy(alpha), own_copy(beta)};  // moved to the tensors' device when the first of them comes
    spare_ = {};
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

  Packed room_for(const Shape& shape, DType dtype, Device device, const Site& site) const {
    const kernels::GroupLayout layout = layout_of(s_, shape, site);
    const Tensor codes = Tensor::empty({code_bytes(shape.numel())}, DType::u8, device);
    const Tensor step = Tensor::empty({layout.groups}, DType::f32, device), offset = empty_like(step);
    return {{codes, step, offset}, shape, dtype, layout};
  }

  /// By the groups' own ranges, unless estimates are added.
  kernels::Coding coding(const Packed& packed, const PackContext& context) const {
    kernels::Coding to;
    to.layout = packed.layout, to.bits = s_.bits, to.stochastic = s_.stochastic, to.key = context.random;
    to.codes = packed.parts[0], to.step = packed.parts[1], to.offset = packed.parts[2];
    to.counts = context.counts;
    return to;
  }

  /// Running range r and minimum m of each group, f32: half precision would stagnate.
  struct Range {
    Tensor alpha, beta;
    bool defined() const { return alpha.defined(); }
    Range on(Device device) const { return {to(alpha, device, MemoryKind::optimizer), to(beta, device, MemoryKind::optimizer)}; }
  };

  bool is_committed() const {
    return latest_.defined() == committed_.defined() && (!latest_.defined() || latest_.alpha.buffer() == committed_.alpha.buffer());
  }
  /// Room for the next estimates: what roll_back returns to must stay as it is.
  Range next_range(const Shape& groups, Device device) {
    if (!is_committed()) return latest_;
    if (spare_.defined()) return std::exchange(spare_, {});
    return {Tensor::empty(groups, DType::f32, device, MemoryKind::optimizer),
            Tensor::empty(groups, DType::f32, device, MemoryKind::optimizer)};
  }

  /// The codes of a tensor by the range as it is now; whoever writes them writes the next range, too.
  Opened running_codes(const Packed& packed, Device device, const PackContext& context) {
    const Tensor& step = packed.parts[1];
    const Range next = next_range(step.shape(), device);
    if (!latest_.defined()) latest_ = next;  // a plan
    if (latest_.alpha.device() != device) {
      const bool was_committed = is_committed();
      latest_ = latest_.on(device);
      if (was_committed) committed_ = latest_;
    }
    check(latest_.alpha.shape() == step.shape(), "the running range of ", context.site.name(), " has ", latest_.alpha.numel(),
          " groups but the tensor has ", step.numel());
    const Range now = std::exchange(latest_, next);
    Opened opened{packed, coding(packed, context)};
    kernels::Coding& codes = opened.codes;
    codes.alpha = now.alpha, codes.beta = now.beta, codes.next_alpha = next.alpha, codes.next_beta = next.beta;
    codes.decay = s_.decay;
    return opened;
  }

  /// The range is known before the tensor is, except at the first call, which calibrates.
  Packed pack_running(const Tensor& x, const PackContext& context) {
    const Packed packed = room_for(x.shape(), x.dtype(), x.device(), context.site);
    const bool first = !latest_.defined();
    if (first) {
      latest_ = next_range(packed.parts[1].shape(), x.device());
      const Tensor lo = empty_like(packed.parts[1]), hi = empty_like(lo);
      kernels::group_range(x, packed.layout, lo, hi, Tensor());  // those that are not finite are counted as they are packed
      kernels::calibrate_range(lo, hi, latest_.alpha, latest_.beta);
    }
    kernels::Coding codes = running_codes(packed, x.device(), context).codes;
    if (first) codes.decay = 1;  // has seen this tensor already
    kernels::quantize_running(x, codes);
    return packed;
  }

  Settings s_;
  Range committed_, latest_, spare_;
};

}  // namespace

std::unique_ptr<Codec> make_affine_codec(int bits, const CodecOptions& options) {
  return std::make_unique<AffineCodec>(read_settings(bits, options));
}

}  // namespace mesa
