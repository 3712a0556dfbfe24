#include "support/audit.h"

#include <algorithm>
#include <cmath>

namespace mesa::testing {
namespace {

/// Half a unit in the last place of the element's own type, which comes on top of a codec's bound.
double rounding_of(DType dtype) { return dtype == DType::bf16 ? 0x1p-8 : dtype == DType::f32 ? 0x1p-23 : 0x1p-52; }

class AuditedCodec : public Codec {
 public:
  explicit AuditedCodec(std::unique_ptr<Codec> inner) : inner_(std::move(inner)) {}

  Packed pack(const Tensor& x, const PackContext& context) override {
    Packed packed = inner_->pack(x, context);
    Kept kept{context.site.name(), x.to_vector<double>(), {}};
    kept.bounds = bounds(kept.exact, packed.layout, x.dtype());
    Audit::get().bounds[kept.site] = kept.bounds;
    compare(kept, inner_->unpack(packed));
    kept_[packed.parts[0].buffer()->id()] = std::move(kept);
    return packed;
  }

  Tensor unpack(const Packed& packed) const override {
    const Tensor x = inner_->unpack(packed);
    check(x.shape() == packed.shape && x.dtype() == packed.dtype, "a decoded tensor has another form than the packed one");
    compare(kept_.at(packed.parts[0].buffer()->id()), x);
    return x;
  }

  int64_t packed_bytes(const Shape& shape, DType dtype, const Site& site) const override {
    return inner_->packed_bytes(shape, dtype, site);
  }
  double error_bound(double lo, double hi) const override { return inner_->error_bound(lo, hi); }
  bool shares_input(DType dtype) const override { return inner_->shares_input(dtype); }
  void commit() override { inner_->commit(); }
  void roll_back() override { inner_->roll_back(); }
  bool leaves(Device device) const override { return inner_->leaves(device); }

 private:
  struct Kept {
    std::string site;
    std::vector<double> exact, bounds;
  };

  std::vector<double> bounds(const std::vector<double>& x, const kernels::GroupLayout& layout, DType dtype) const {
    const auto group = [&](size_t e) { return static_cast<int64_t>(e) / layout.inner % layout.groups; };
    std::vector<double> lo(layout.groups, INFINITY), hi(layout.groups, -INFINITY), out(x.size());
    for (size_t e = 0; e < x.size(); ++e) {
      lo[group(e)] = std::min(lo[group(e)], x[e]);
      hi[group(e)] = std::max(hi[group(e)], x[e]);
    }
    for (size_t e = 0; e < x.size(); ++e) {
      const double bound = inner_->error_bound(lo[group(e)], hi[group(e)]);
      out[e] = bound == 0 ? 0 : bound + rounding_of(dtype) * (std::abs(x[e]) + bound);
    }
    return out;
  }

  void compare(const Kept& kept, const Tensor& decoded) const {
    Audit& audit = Audit::get();
    const std::vector<double> x = decoded.to_vector<double>();
    check(x.size() == kept.exact.size(), "a decoded tensor has ", x.size(), " elements, not ", kept.exact.size());
    ++audit.decoded;
    for (size_t e = 0; e < x.size(); ++e) {
      const double error = std::abs(x[e] - kept.exact[e]);
      const double ratio = error == 0 ? 0 : kept.bounds[e] == 0 || std::isnan(error) ? INFINITY : error / kept.bounds[e];
      if (ratio > audit.worst) audit.worst = ratio, audit.worst_site = kept.site;
    }
  }

  std::unique_ptr<Codec> inner_;
  std::map<uint64_t, Kept> kept_;  // by the buffer of the codes
};

class ProbeCodec : public Codec {
 public:
  Packed pack(const Tensor& x, const PackContext& context) override {
    site_ = context.site.name();
    Probe::get().seen[site_] = x.numel();
    return {{changed(x, "")}, x.shape(), x.dtype(), {}};
  }
  Tensor unpack(const Packed& packed) const override { return changed(packed.parts[0], site_); }
  int64_t packed_bytes(const Shape& shape, DType dtype, const Site&) const override { return shape.numel() * size_of(dtype); }
  double error_bound(double lo, double hi) const override { return Probe::get().share * (hi - lo); }

 private:
  /// A copy of x, changed at the probed element if this is the probed site.
  static Tensor changed(const Tensor& x, const std::string& site) {
    std::vector<double> values = x.to_vector<double>();
    const Probe& probe = Probe::get();
    if (!site.empty() && probe.site == site) values[probe.element] += probe.change;
    return to(Tensor::from(x.shape(), values), x.device());
  }
  std::string site_;
};

std::vector<Setting> all_settings() {
  std::vector<Setting> all{{"exact", {}}, {"host", {}}, {"bf16", {}}};
  for (const char* codec : {"int8", "int4", "int2"})
    for (const char* rounding : {"stochastic", "nearest"})
      for (const char* groups : {"heads", "layer", "channel", "6 channels", "8", "256"})
        for (const char* range : {"current", "running"}) {
          const bool count = std::string(groups) == "8" || std::string(groups) == "256";
          if (count && range[0] == 'r') continue;  // refused: a run of consecutive elements has no history
          all.push_back({codec, {{"groups", groups}, {"range", range}, {"rounding", rounding}}});
        }
  return all;
}

}  // namespace

Audit& Audit::get() {
  static Audit audit;
  return audit;
}

Probe& Probe::get() {
  static Probe probe;
  return probe;
}

void register_test_codecs() {
  static const bool once = [] {
    register_codec("audited", {"codec", "groups", "range", "decay", "rounding"}, [](CodecOptions options) -> std::unique_ptr<Codec> {
      const auto inner = options.extract("codec");
      return std::make_unique<AuditedCodec>(make_codec(inner ? inner.mapped() : "exact", options));
    });
    register_codec("probe", {}, [](const CodecOptions&) -> std::unique_ptr<Codec> { return std::make_unique<ProbeCodec>(); });
    return true;
  }();
  static_cast<void>(once);
}

std::string Setting::text() const {
  std::string text = codec;
  for (const auto& [key, value] : options) text += " " + key + ": " + value;
  return text;
}

const std::vector<Setting>& settings() {
  static const std::vector<Setting> all = all_settings();
  return all;
}

}  // namespace mesa::testing
