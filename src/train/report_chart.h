// Charts as inline SVG: curves thinned so that spikes stay visible, round ticks, and words for those who cannot see them.
#pragma once
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

namespace mesa::report {

inline constexpr int kColours = 8;  ///< that the page's style tells apart; more curves begin again

/// y over x, x ascending; a y that is not finite is a gap with a mark.
struct Curve {
  std::string name;
  int colour = 0;
  bool dashed = false;
  std::vector<double> x, y;
};

struct Chart {
  std::string id;     ///< letters and dashes
  std::string title;  ///< with the unit
  bool log = false;   ///< a logarithmic axis where values are positive and span more than a factor of 50
  bool from_zero = false;
  std::vector<Curve> curves;
};

/// Text for HTML: markup characters, controls and bytes that are not UTF-8 cannot do anything there.
std::string escape(const std::string& text);
/// "0.0144", "12k", "5e-4": at most four digits.
std::string short_number(double x);
/// True if the curve has more points than are drawn.
bool is_thinned(const Curve& curve);
/// A <figure>: caption, legend, curves, axes and a description in words.
std::string draw(const Chart& chart);
/// The points that are drawn, for the page's script: {"curves": [{"name", "colour", "points": [x, y, x, y, ...]}], "x": [first, last]}.
nlohmann::ordered_json points_of(const Chart& chart);

}  // namespace mesa::report
