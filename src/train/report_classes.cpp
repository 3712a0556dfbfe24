// The part of a report about classes: the picture of what is taken for what, the worst pairs, the worst classes.
#include <algorithm>
#include <cmath>

#include "report_sections.h"

namespace mesa::report {
namespace {

constexpr size_t kMostRows = 20;        // of a table
constexpr int64_t kMostClasses = 5000;  // of a picture that is worth its bytes

std::string cell(const std::string& text) { return "<td>" + escape(text) + "</td>"; }
std::string cell(int64_t x) { return cell(std::to_string(x)); }
std::string percent(double x) { return cell(std::isnan(x) ? "" : short_number(x)); }

std::string table(const std::string& head, const std::string& rows) {
  return "<div class=\"scroll\"><table><thead><tr>" + head + "</tr></thead><tbody>\n" + rows + "</tbody></table></div>\n";
}

std::string pairs_table(const Confusion& confusion) {
  std::string rows;
  for (const ConfusionCell& c : confusion.most_confused(kMostRows))
    rows += "<tr>" + cell(confusion.name(c.truth)) + cell(confusion.name(c.predicted)) + cell(c.images) + "</tr>\n";
  return rows.empty() ? "" : table("<th>class</th><th>taken for</th><th>images</th>", rows);
}

/// The classes with the lowest top-1; those without images are left out.
std::string worst_table(const Confusion& confusion) {
  std::vector<ClassRow> worst = confusion.rows();
  std::erase_if(worst, [](const ClassRow& r) { return r.images == 0; });
  std::stable_sort(worst.begin(), worst.end(), [](const ClassRow& a, const ClassRow& b) { return a.top1() < b.top1(); });
  if (worst.size() > kMostRows) worst.resize(kMostRows);
  std::string rows;
  for (const ClassRow& r : worst)
    rows += "<tr>" + cell(r.name) + cell(r.images) + percent(r.top1()) + percent(r.top5()) + percent(r.precision()) + "</tr>\n";
  return table("<th>class</th><th>images</th><th>top-1 %</th><th>top-5 %</th><th>precision %</th>", rows);
}

std::string picture(const Confusion& confusion) {
  if (confusion.classes() > kMostClasses) return "";
  return concat("<img alt=\"Confusion of ", confusion.classes(),
                " classes: rows are labels, columns predictions; the tables tell the largest\" src=\"data:image/png;base64,",
                to_base64(to_png(draw_confusion(confusion))), "\"/>\n");
}

}  // namespace

std::string classes_section(const RunRecord& run) {
  const Confusion& confusion = run.confusion;
  if (confusion.images() == 0) return "";
  return concat("<h2>Classes of the test set</h2>\n<p class=\"soft\">After the last epoch: which classes are taken for which (",
                confusion.classes(),
                " classes by number; a row is divided by its images, and a cell is as dark as the root of its share), "
                "the pairs that are confused most, and the classes with the lowest top-1. The mean of top-1 over the classes is ",
                escape(short_number(confusion.mean_top1())), " %; classes.csv has all.</p>\n<div class=\"classes\">\n", picture(confusion),
                pairs_table(confusion), worst_table(confusion), "</div>\n");
}

}  // namespace mesa::report
