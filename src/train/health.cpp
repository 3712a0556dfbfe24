#include "mesa/train/health.h"

#include <fnmatch.h>

#include <algorithm>
#include <cmath>

namespace mesa {
namespace {

constexpr int64_t kElements = 1 << 20;  // of a site are looked at: those of the first pictures

Tensor first_pictures(const Tensor& x) {
  if (x.rank() == 0 || x.numel() <= kElements) return x;
  const int64_t each = x.numel() / x.dim(0);
  return x.narrow(0, 0, std::clamp<int64_t>(kElements / each, 1, x.dim(0)));
}

}  // namespace

bool matches_any(const std::vector<std::string>& globs, const std::string& name) {
  return std::any_of(globs.begin(), globs.end(), [&](const auto& glob) { return fnmatch(glob.c_str(), name.c_str(), FNM_EXTMATCH) == 0; });
}

void HealthMonitor::begin(int64_t step) {
  looking_ = interval_ > 0 && step % interval_ == 0;
  if (!looking_) return;
  before_.clear(), sums_.clear(), seen_.clear();
  for (const SiteRecord& site : policy_.sites()) before_[site.site.name()] = site;
  policy_.observe([this](const SiteRecord& site, const Tensor& x, const Saved& saved) { look(site, x, saved); });
}

void HealthMonitor::look(const SiteRecord& site, const Tensor& x, const Saved& saved) {
  const std::string name = site.site.name();
  const std::vector<double> exact = to(first_pictures(x), kCpu).to_vector<double>();
  const std::vector<double> decoded = to(first_pictures(saved.get()), kCpu).to_vector<double>();
  Sums& sums = sums_[name];
  for (size_t i = 0; i < exact.size(); ++i) {
    const double error = decoded[i] - exact[i];
    sums.error += error * error;
    sums.norm += exact[i] * exact[i];
  }
  if (!seen_.contains(name) && matches_any(histograms_, name)) seen_[name] = histogram_of(first_pictures(x));
}

std::optional<HealthMonitor::Result> HealthMonitor::finish(int64_t step) {
  if (!looking_) return {};
  looking_ = false;
  policy_.observe({});
  Result out;
  for (const SiteRecord& site : policy_.sites()) {
    const auto found = sums_.find(site.site.name());
    if (found == sums_.end()) continue;
    const SiteRecord& before = before_[site.site.name()];
    const int64_t elements = site.elements - before.elements;
    const double clamped = elements > 0 ? static_cast<double>(site.saturated - before.saturated) / static_cast<double>(elements) : 0;
    const auto& [error, norm] = found->second;
    out.rows.push_back({step, found->first, site.codec, norm > 0 ? std::sqrt(error / norm) : error > 0 ? kNotMeasured : 0, clamped});
  }
  out.histograms.assign(seen_.begin(), seen_.end());
  return out;
}

}  // namespace mesa
