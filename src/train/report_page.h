// What every page of a report has: its style for light and dark, wide and narrow screens, and the script that shows values under the
// pointer.
#pragma once
#include <string>

namespace mesa::report {

/// A whole document. `body`: HTML; `data`: JSON for the script. Neither can load anything from elsewhere: the page forbids it.
std::string page(const std::string& title, const std::string& body, const std::string& data);

}  // namespace mesa::report
