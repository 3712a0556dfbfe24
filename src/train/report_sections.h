// The parts of a report: which charts there are, memory by site, health, classes, pictures.
#pragma once
#include <span>

#include "mesa/train/report.h"
#include "report_chart.h"

namespace mesa::report {

/// Of one run its curves, each in a colour of its own; of several a colour for each run.
std::vector<Chart> charts_of(std::span<const RunRecord> runs);
std::string memory_section(const RunRecord& run);
std::string memory_comparison(std::span<const RunRecord> runs);
std::string health_section(const RunRecord& run);
std::string classes_section(const RunRecord& run);
std::string pictures_section(const RunRecord& run);

}  // namespace mesa::report
