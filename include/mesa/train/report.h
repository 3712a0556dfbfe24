// A run at a glance: one HTML file, readable without a network, from what lies in the run's folder.
#pragma once
#include <span>
#include <string>
#include <vector>

#include "mesa/train/confusion.h"
#include "mesa/train/metrics.h"
#include "mesa/train/pictures.h"

namespace mesa {

/// Everything that a run's folder tells. What is missing or damaged is empty here, and `notes` says so.
struct RunRecord {
  std::string name;  ///< of the folder
  std::vector<IntervalRow> intervals;
  std::vector<EpochRow> epochs;
  std::vector<MemoryRow> memory;
  std::vector<HealthRow> health;
  RunSummary summary;
  bool has_summary = false;
  std::vector<std::pair<std::string, std::string>> environment;
  std::string config;  ///< YAML
  PictureList samples, mistakes;
  Confusion confusion;  ///< of the test set, after the last epoch
  std::vector<std::string> warnings;  ///< the last ones of log.txt
  std::vector<std::string> notes;
};

/// Throws Error only if `folder` is not a run's.
RunRecord read_run(const std::string& folder);

/// The page: of one run in full, of several drawn over one another. Text of the runs can do nothing but be read.
std::string report_html(std::span<const RunRecord> runs);

/// Reads the folders and writes the page to `path`; empty: report.html in the folder of a single run, or in the current one. Returns the
/// path. Throws Error if a folder is not a run's and on I/O errors.
std::string write_report(const std::vector<std::string>& folders, const std::string& path = "");

}  // namespace mesa
