#include "report_chart.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <nlohmann/json.hpp>

#include "mesa/base/error.h"

namespace mesa::report {
namespace {

constexpr int kColumns = 600;       // about as many pixels as a chart is wide
constexpr double kSide = 1000;      // of the SVG's own coordinates, which are stretched over the plot
constexpr double kLogFrom = 50;     // largest over smallest value from which an axis is logarithmic
constexpr double kLargest = 1e300;  // values beyond are drawn there, so that differences stay finite
constexpr size_t kMostTicks = 6;

template <class... Args>
std::string text_of(const char* format, Args... args) {
  char text[64];
  std::snprintf(text, sizeof text, format, args...);
  return text;
}

struct Point {
  double x, y;  // y is NaN in a gap
};

struct Range {
  double low = std::numeric_limits<double>::infinity(), high = -std::numeric_limits<double>::infinity();
  void take(double v) { low = std::min(low, v), high = std::max(high, v); }
  bool empty() const { return low > high; }
};

Range x_range(const Chart& chart) {
  Range r;
  for (const Curve& c : chart.curves)
    for (const double x : c.x) r.take(x);
  return r;
}

struct Thinned {
  std::vector<Point> points;  // of each column the smallest and the largest value, in their order; one without a finite value is a gap
  std::vector<Point> means;   // of the columns; empty where `points` are simply all
};

Thinned thin(const Curve& curve, const Range& x) {
  Thinned out;
  const size_t n = std::min(curve.x.size(), curve.y.size());
  const auto value = [&](size_t i) { return std::clamp(curve.y[i], -kLargest, kLargest); };
  if (!is_thinned(curve)) {
    for (size_t i = 0; i < n; ++i) out.points.push_back({curve.x[i], std::isfinite(curve.y[i]) ? value(i) : std::nan("")});
    return out;
  }
  const auto column = [&](size_t i) {
    return std::min(kColumns - 1, static_cast<int>((curve.x[i] - x.low) / (x.high - x.low) * kColumns));
  };
  for (size_t from = 0, to = 0; from < n; from = to) {
    size_t low = n, high = n, finite = 0;
    double sum = 0;
    for (to = from; to < n && column(to) == column(from); ++to) {
      if (!std::isfinite(curve.y[to])) continue;
      ++finite, sum += value(to);
      if (low == n || value(to) < value(low)) low = to;
      if (high == n || value(to) > value(high)) high = to;
    }
    if (low == n) {
      out.points.push_back({curve.x[from], std::nan("")});
      out.means.push_back(out.points.back());
      continue;
    }
    out.points.push_back({curve.x[std::min(low, high)], value(std::min(low, high))});
    if (low != high) out.points.push_back({curve.x[std::max(low, high)], value(std::max(low, high))});
    out.means.push_back({(curve.x[from] + curve.x[to - 1]) / 2, sum / static_cast<double>(finite)});
  }
  return out;
}

/// The next of 1, 2, 5, 10, ... at or above x.
double round_up(double x) {
  const double power = std::pow(10, std::floor(std::log10(x)));
  for (const double factor : {1.0, 2.0, 5.0})
    if (factor * power >= x * (1 - 1e-9)) return factor * power;
  return 10 * power;
}

struct Axis {
  double low = 0, high = 1;
  bool log = false;
  std::vector<double> ticks;
  double place(double v) const {  // 0 to 1
    if (log) return (std::log10(v) - std::log10(low)) / (std::log10(high) - std::log10(low));
    return (v - low) / (high - low);
  }
};

/// `widen`: to round ends. Else only ticks inside.
Axis linear_axis(Range r, bool widen) {
  if (r.high - r.low <= 1e-12 * std::max(std::abs(r.low), std::abs(r.high))) {  // one value
    const double room = 0.1 * std::abs(r.low);
    r = r.low == 0 ? Range{0, 1} : Range{r.low - room, r.high + room};
  }
  const double step = round_up((r.high - r.low) / 5);
  Axis a{r.low, r.high, false, {}};
  const double first = widen ? std::floor(r.low / step) : std::ceil(r.low / step),
               last = widen ? std::ceil(r.high / step) : std::floor(r.high / step);
  if (widen) a.low = first * step, a.high = last * step;
  for (int i = 0; i <= std::min(12.0, last - first); ++i) a.ticks.push_back((first + i) * step);
  return a;
}

Axis log_axis(const Range& r) {
  Axis a{r.low / 1.1, r.high * 1.1, true, {}};
  const int first = static_cast<int>(std::floor(std::log10(r.low))), last = static_cast<int>(std::ceil(std::log10(r.high)));
  const int every = 1 + (last - first) / static_cast<int>(kMostTicks);
  for (int power = first; power <= last; ++power)
    for (const double factor : {1.0, 2.0, 5.0}) {
      const double tick = factor * std::pow(10, power);
      if (factor > 1 && last - first > 3) continue;  // decades alone
      if ((power - first) % every == 0 && tick >= a.low && tick <= a.high) a.ticks.push_back(tick);
    }
  return a;
}

Axis y_axis(const Chart& chart) {
  Range r;
  for (const Curve& c : chart.curves)
    for (const double y : c.y)
      if (std::isfinite(y)) r.take(std::clamp(y, -kLargest, kLargest));
  if (chart.log && r.low > 0 && r.high / r.low > kLogFrom) return log_axis(r);
  if (chart.from_zero) r.take(0);
  return linear_axis(r, true);
}

std::string coordinates(const Point& p, const Axis& x, const Axis& y) {
  return text_of("%.1f %.1f", kSide * x.place(p.x), kSide * (1 - y.place(p.y)));
}

/// A point that stands alone becomes a dot: a line of no length with round ends.
std::string path_of(const std::vector<Point>& points, const Axis& x, const Axis& y) {
  std::string out;
  bool open = false;
  for (size_t i = 0; i < points.size(); ++i) {
    if (std::isnan(points[i].y)) {
      open = false;
      continue;
    }
    const bool alone = !open && (i + 1 == points.size() || std::isnan(points[i + 1].y));
    out += open ? 'L' : 'M';
    out += coordinates(points[i], x, y);
    if (alone) out += "h.1";
    open = true;
  }
  return out;
}

/// The curve; where it was thinned, the mean upon a pale band of all values.
std::string lines_of(const Curve& c, const Axis& x, const Axis& y) {
  const Thinned thinned = thin(c, {x.low, x.high});
  const std::string kind = concat("<path class=\"line c", c.colour % kColours, c.dashed ? " dashed" : "");
  const std::string points = path_of(thinned.points, x, y);
  if (thinned.means.empty()) return concat(kind, "\" d=\"", points, "\"/>\n");
  return concat(kind, " band\" d=\"", points, "\"/>\n", kind, "\" d=\"", path_of(thinned.means, x, y), "\"/>\n");
}

/// Short strokes at the upper edge where a value is not finite, one a column.
std::string marks_of(const Curve& curve, const Axis& x) {
  std::string out;
  int last = -1;
  for (size_t i = 0; i < std::min(curve.x.size(), curve.y.size()); ++i) {
    if (std::isfinite(curve.y[i])) continue;
    const int column = static_cast<int>(x.place(curve.x[i]) * kColumns);
    if (column != last) out += text_of("M%.1f 0v60", kSide * x.place(curve.x[i]));
    last = column;
  }
  return out;
}

std::string in_words(const Curve& c) {
  size_t first = c.y.size(), last = 0, low = 0, high = 0, odd = 0;
  for (size_t i = 0; i < c.y.size(); ++i) {
    if (!std::isfinite(c.y[i])) {
      ++odd;
      continue;
    }
    if (first == c.y.size()) first = low = high = i;
    last = i;
    if (c.y[i] < c.y[low]) low = i;
    if (c.y[i] > c.y[high]) high = i;
  }
  if (first == c.y.size()) return c.name + ": no finite value. ";
  const auto at = [&](size_t i) { return short_number(c.y[i]) + " at step " + text_of("%.0f", c.x[i]); };
  std::string out = c.name + ": " + at(first) + ", " + at(last) + "; lowest " + at(low) + ", highest " + at(high);
  if (odd > 0) out += concat("; ", odd, " not finite");
  return out + ". ";
}

std::string legend(const Chart& chart, bool marks) {
  std::string out;
  for (const Curve& c : chart.curves)
    out +=
        concat("<span class=\"key\"><i class=\"c", c.colour % kColours, c.dashed ? " dashed" : "", "\"></i>", escape(c.name), "</span> ");
  if (marks) out += "<span class=\"key\"><i class=\"odd\"></i>not finite</span>";
  return "<p class=\"legend\">" + out + "</p>";
}

std::string grid(const Axis& y) {
  std::string out;
  for (const double tick : y.ticks) out += text_of("M0 %.1fH1000", kSide * (1 - y.place(tick)));
  return "<path class=\"grid\" d=\"" + out + "\"/>";
}

std::string labels(const Axis& x, const Axis& y) {
  std::string out;
  for (const double tick : y.ticks)
    out += text_of("<span class=\"y\" style=\"top:%.2f%%\">", 100 * (1 - y.place(tick))) + short_number(tick) + "</span>";
  for (const double tick : x.ticks)
    out += text_of("<span class=\"x\" style=\"left:%.2f%%\">", 100 * x.place(tick)) + short_number(tick) + "</span>";
  return "<div class=\"axes\" aria-hidden=\"true\">" + out + "</div>";
}

bool has_values(const Chart& chart) {
  for (const Curve& c : chart.curves)
    if (std::any_of(c.y.begin(), c.y.end(), [](double y) { return std::isfinite(y); })) return true;
  return false;
}

/// The length of the UTF-8 sequence at `at`, 0 if it is none (overlong forms and surrogates included).
size_t sequence_length(const std::string& text, size_t at) {
  const auto byte = [&](size_t i) { return i < text.size() ? static_cast<uint8_t>(text[i]) : uint8_t{0}; };
  const uint8_t first = byte(at);
  const size_t length = first < 0x80                    ? 1
                        : first >= 0xc2 && first < 0xe0 ? 2
                        : first >= 0xe0 && first < 0xf0 ? 3
                        : first >= 0xf0 && first < 0xf5 ? 4
                                                        : 0;
  for (size_t i = 1; i < length; ++i)
    if ((byte(at + i) & 0xc0) != 0x80) return 0;
  const uint8_t second = byte(at + 1);
  if ((first == 0xe0 && second < 0xa0) || (first == 0xed && second > 0x9f) || (first == 0xf0 && second < 0x90) ||
      (first == 0xf4 && second > 0x8f))
    return 0;
  return length;
}

}  // namespace

std::string escape(const std::string& text) {
  static constexpr const char* kReplacement = "\xef\xbf\xbd";
  std::string out;
  for (size_t at = 0; at < text.size();) {
    const size_t length = sequence_length(text, at);
    const char c = text[at];
    if (length == 0 || (length == 1 && c != '\n' && c != '\t' && (static_cast<uint8_t>(c) < 0x20 || c == 0x7f)))
      out += kReplacement;
    else if (c == '&' || c == '<' || c == '>' || c == '"' || c == '\'')
      out += concat("&#", static_cast<int>(c), ";");
    else
      out += text.substr(at, length);
    at += std::max<size_t>(1, length);
  }
  return out;
}

std::string short_number(double x) {
  if (!std::isfinite(x)) return std::isnan(x) ? "not measured" : x > 0 ? "infinity" : "-infinity";
  const double size = std::abs(x);
  static constexpr std::array<std::pair<double, const char*>, 3> kUnits{{{1e9, "G"}, {1e6, "M"}, {1e3, "k"}}};
  if (size >= 1e4 && size < 1e13)
    for (const auto& [unit, letter] : kUnits)
      if (size >= unit) return text_of("%.4g", x / unit) + letter;
  if (size != 0 && (size < 1e-3 || size >= 1e13)) {
    std::string text = text_of("%.3g", x);  // 5e-04
    const size_t e = text.find('e');
    if (e != std::string::npos && e + 2 < text.size() && text[e + 2] == '0') text.erase(e + 2, 1);
    return text;
  }
  return text_of("%.4g", x);
}

bool is_thinned(const Curve& curve) { return curve.x.size() > 2 * kColumns; }

std::string draw(const Chart& chart) {
  const std::string head = "<figure class=\"chart\" id=\"chart-" + chart.id + "\">\n<figcaption><h3>" + escape(chart.title) + "</h3>";
  if (!has_values(chart)) return head + "</figcaption>\n<p class=\"none\">Nothing to draw yet.</p>\n</figure>\n";
  const Axis x = linear_axis(x_range(chart), false), y = y_axis(chart);
  std::string lines, marks, words;
  for (const Curve& c : chart.curves) {
    lines += lines_of(c, x, y);
    marks += marks_of(c, x);
    words += in_words(c);
  }
  if (!marks.empty()) marks = "<path class=\"odd\" d=\"" + marks + "\"/>\n";
  return concat(head, legend(chart, !marks.empty()), "</figcaption>\n<div class=\"plot\" tabindex=\"0\" data-chart=\"", chart.id,
                "\">\n<svg viewBox=\"0 0 1000 1000\" preserveAspectRatio=\"none\" role=\"img\" aria-labelledby=\"t-", chart.id, " d-",
                chart.id, "\">\n<title id=\"t-", chart.id, "\">", escape(chart.title), y.log ? ", logarithmic" : "",
                "</title>\n<desc id=\"d-", chart.id, "\">", escape(words), "</desc>\n", grid(y), "\n", lines, marks, "</svg>\n",
                labels(x, y), "\n</div>\n</figure>\n");
}

nlohmann::ordered_json points_of(const Chart& chart) {
  const auto rounded = [](double v) {
    return std::isfinite(v) ? nlohmann::ordered_json(std::strtod(text_of("%.5g", v).c_str(), nullptr)) : nlohmann::ordered_json();
  };
  nlohmann::ordered_json curves = nlohmann::ordered_json::array();
  if (!has_values(chart)) return {{"curves", curves}, {"x", {0, 1}}};
  const Axis x = linear_axis(x_range(chart), false);
  for (const Curve& c : chart.curves) {
    nlohmann::ordered_json points = nlohmann::ordered_json::array();
    for (const Point& p : thin(c, {x.low, x.high}).points) {
      points.push_back(static_cast<int64_t>(p.x));
      points.push_back(rounded(p.y));
    }
    curves.push_back({{"name", c.name}, {"colour", c.colour % kColours}, {"points", std::move(points)}});
  }
  return {{"curves", std::move(curves)}, {"x", {x.low, x.high}}};
}

}  // namespace mesa::report
