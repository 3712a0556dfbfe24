// How well values are stored, measured at a step now and then: the error of what backward decodes, and the share that was clamped.
#pragma once
#include <map>
#include <optional>

#include "mesa/storage/policy.h"
#include "mesa/train/metrics.h"
#include "mesa/train/tensorboard.h"

namespace mesa {

class HealthMonitor {
 public:
  /// Every `interval`-th step is looked at; 0: none, which costs nothing. `histograms`: globs of sites.
  HealthMonitor(int64_t interval, std::vector<std::string> histograms, StoragePolicy& policy)
      : interval_(interval), histograms_(std::move(histograms)), policy_(policy) {}

  /// Before the update that makes `step`, counted from 1.
  void begin(int64_t step);
  struct Result {
    std::vector<HealthRow> rows;
    std::vector<std::pair<std::string, Histogram>> histograms;  ///< of the exact values, by site
  };
  /// After it: what was seen, if this step was looked at.
  std::optional<Result> finish(int64_t step);

 private:
  void look(const SiteRecord& site, const Tensor& x, const Saved& saved);
  struct Sums {
    double error = 0, norm = 0;  // of squares
  };
  int64_t interval_;
  std::vector<std::string> histograms_;
  StoragePolicy& policy_;
  bool looking_ = false;
  std::map<std::string, SiteRecord> before_;
  std::map<std::string, Sums> sums_;
  std::map<std::string, Histogram> seen_;
};

/// True if one of the globs, as storage rules have them, matches.
bool matches_any(const std::vector<std::string>& globs, const std::string& name);

}  // namespace mesa
