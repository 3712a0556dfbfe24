#include "mesa/train/report.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "config_keys.h"
#include "mesa/tensor/memory.h"
#include "mesa/train/files.h"
#include "report_chart.h"
#include "report_page.h"
#include "report_sections.h"

namespace mesa {
namespace report {
namespace {

std::string cell(const std::string& text) { return "<td>" + escape(text) + "</td>"; }
std::string cell(double x) { return cell(std::isnan(x) ? "" : short_number(x)); }

std::string bytes(double x) { return std::isfinite(x) && x > 0 && x < 1e18 ? format_bytes(std::llround(x)) : ""; }

double best_top1(const RunRecord& run) {
  double best = kNotMeasured;
  for (const EpochRow& row : run.epochs) best = std::fmax(best, row.eval_top1);  // passes over NaN
  return best;
}

/// The summary, and where the run has gone on since its last row.
RunSummary summary_of(const RunRecord& run) {
  RunSummary s = run.summary;
  if (run.epochs.empty() || (run.has_summary && s.steps >= run.epochs.back().step)) return s;
  const EpochRow& last = run.epochs.back();
  s.top1 = last.eval_top1, s.top5 = last.eval_top5, s.eval_loss = last.eval_loss, s.train_loss = last.train_loss;
  s.epochs = last.epoch, s.steps = last.step, s.images_per_second = last.images_per_second, s.peak_bytes = last.peak_bytes;
  s.activation_bytes_per_image = last.activation_bytes_per_image;
  return s;
}

std::string times_less(const RunSummary& s) {
  const double times = s.exact_activation_bytes_per_image / s.activation_bytes_per_image;
  return std::isfinite(times) && times > 1.005 ? short_number(std::round(10 * times) / 10) + " times less than exact" : "";
}

class Facts {
 public:
  void add(const std::string& name, const std::string& value, const std::string& more = "") {
    if (value.empty()) return;
    html_ += "<div><dt>" + escape(name) + "</dt><dd>" + escape(value) + (more.empty() ? "" : "<small>" + escape(more) + "</small>") +
             "</dd></div>\n";
  }
  std::string html() const { return html_.empty() ? "" : "<dl class=\"facts\">\n" + html_ + "</dl>\n"; }

 private:
  std::string html_;
};

std::string percent(double x) { return std::isfinite(x) ? short_number(x) + " %" : ""; }
std::string plain(double x) { return std::isfinite(x) ? short_number(x) : ""; }
std::string count(int64_t n) { return n > 0 ? std::to_string(n) : ""; }

std::string facts(const RunRecord& run) {
  const RunSummary s = summary_of(run);
  Facts out;
  const double best = best_top1(run);
  out.add("Top-1", percent(s.top1), std::isfinite(best) ? "best " + percent(best) : "");
  out.add("Top-5", percent(s.top5));
  out.add("Loss, eval", plain(s.eval_loss), std::isfinite(s.train_loss) ? "train " + plain(s.train_loss) : "");
  out.add("Steps", count(s.steps), s.epochs > 0 ? concat("epochs ", s.epochs) : "");
  out.add("Images per second", plain(s.images_per_second));
  out.add("Kept per image", bytes(s.activation_bytes_per_image), times_less(s));
  out.add("Peak memory", bytes(static_cast<double>(s.peak_bytes)));
  out.add("Parameters", s.parameters > 0 ? short_number(static_cast<double>(s.parameters)) : "");
  out.add("Storage", s.storage);
  return out.html();
}

std::string list(const std::string& title, const std::vector<std::string>& lines) {
  if (lines.empty()) return "";
  std::string items;
  for (const std::string& line : lines) items += "<li>" + escape(line) + "</li>\n";
  return "<section class=\"notes\"><strong>" + escape(title) + "</strong><ul>\n" + items + "</ul></section>\n";
}

std::string epoch_table(const RunRecord& run) {
  if (run.epochs.empty()) return "";
  constexpr size_t kMostRows = 400;
  std::string rows;
  const size_t skipped = run.epochs.size() > kMostRows ? run.epochs.size() - kMostRows : 0;
  for (size_t i = skipped; i < run.epochs.size(); ++i) {
    const EpochRow& r = run.epochs[i];
    rows += "<tr>" + cell(std::to_string(r.epoch)) + cell(r.train_loss) + cell(r.eval_loss) + cell(r.eval_top1) + cell(r.eval_top5) +
            cell(r.lr) + cell(r.images_per_second) + cell(r.seconds) + "</tr>\n";
  }
  return "<details><summary>Numbers of each epoch</summary>\n" +
         (skipped > 0 ? concat("<p class=\"soft\">The last ", kMostRows, "; all are in summary.csv.</p>\n") : "") +
         "<div class=\"scroll\"><table><thead><tr><th>epoch</th><th>train loss</th><th>eval loss</th><th>top-1 %</th><th>top-5 "
         "%</th><th>lr</th>"
         "<th>images/s</th><th>seconds</th></tr></thead><tbody>\n" +
         rows + "</tbody></table></div></details>\n";
}

std::string environment(const RunRecord& run) {
  std::string out;
  for (const auto& [key, value] : run.environment) out += "<dt>" + escape(key) + "</dt><dd>" + escape(value) + "</dd>\n";
  if (out.empty() && run.config.empty()) return "";
  if (!out.empty()) out = "<dl class=\"env\">\n" + out + "</dl>\n";
  if (!run.config.empty()) out += "<details><summary>config.yaml</summary>\n<pre>" + escape(run.config) + "</pre></details>\n";
  return "<h2>Environment and config</h2>\n" + out;
}

std::string charts_html(const std::vector<Chart>& charts) {
  std::string out;
  bool thinned = false;
  for (const Chart& chart : charts) {
    out += draw(chart);
    thinned |= std::any_of(chart.curves.begin(), chart.curves.end(), is_thinned);
  }
  const std::string note = thinned ? "<p class=\"soft\">Of long curves the line is the mean of the steps that share a pixel, the pale band "
                                     "their smallest and largest values.</p>\n"
                                   : "";
  return "<h2>Over the steps</h2>\n" + note + "<section class=\"charts\" aria-label=\"Charts\">\n" + out + "</section>\n";
}

std::string one_run(const RunRecord& run, const std::vector<Chart>& charts) {
  return "<header><h1>" + escape(run.name) + "</h1></header>\n" + facts(run) + list("Not everything could be read", run.notes) +
         list("Warnings of the run", run.warnings) + charts_html(charts) + epoch_table(run) + memory_section(run) + health_section(run) +
         classes_section(run) + pictures_section(run) + environment(run);
}

std::map<std::string, std::string> values_of(RunConfig config) {
  std::map<std::string, std::string> out;
  for (const config::Key& key : config::keys()) out[key.name] = config::write(key, config);
  const std::string yaml = to_yaml(config);
  out["storage"] = config.storage.name == "custom" ? yaml.substr(yaml.rfind("  rules:")) : config.storage.name;
  out.erase("output");
  return out;
}

/// The keys in which the configs differ; a config that this version cannot read is left out with a note.
std::string differences(std::span<const RunRecord> runs) {
  std::map<std::string, std::vector<std::string>> values;
  std::vector<std::string> notes;
  for (size_t i = 0; i < runs.size(); ++i) {
    try {
      for (auto& [key, value] : values_of(parse_config(runs[i].config, "config.yaml"))) {
        values[key].resize(runs.size());
        values[key][i] = value;
      }
    } catch (const std::exception& e) {
      notes.push_back(runs[i].name + ": " + e.what());
    }
  }
  std::string head, rows;
  for (const RunRecord& run : runs) head += "<th>" + escape(run.name) + "</th>";
  for (const auto& [key, row] : values) {
    if (std::set<std::string>(row.begin(), row.end()).size() == 1) continue;
    rows += "<tr>" + cell(key);
    for (const std::string& value : row) rows += cell(value);
    rows += "</tr>\n";
  }
  const std::string table = rows.empty() ? "<p class=\"soft\">The configs are equal but for their folders.</p>\n"
                                         : "<div class=\"scroll\"><table><thead><tr><th>key</th>" + head + "</tr></thead><tbody>\n" + rows +
                                               "</tbody></table></div>\n";
  return "<h2>Differences of the configs</h2>\n" + list("Not compared", notes) + table;
}

std::string comparison(std::span<const RunRecord> runs, const std::vector<Chart>& charts) {
  std::string rows, notes;
  for (const RunRecord& run : runs) {
    const RunSummary s = summary_of(run);
    rows += "<tr>" + cell(run.name) + cell(s.storage) + cell(s.top1) + cell(best_top1(run)) + cell(s.eval_loss) + cell(s.train_loss) +
            cell(s.images_per_second) + cell(bytes(s.activation_bytes_per_image)) + cell(bytes(s.exact_activation_bytes_per_image)) +
            cell(bytes(static_cast<double>(s.peak_bytes))) + cell(std::to_string(s.steps)) + "</tr>\n";
    notes += list(run.name + ": not everything could be read", run.notes) + list(run.name + ": warnings", run.warnings);
  }
  return concat("<header><h1>", runs.size(), " runs</h1></header>\n",
                "<div class=\"scroll\"><table><thead><tr><th>run</th><th>storage</th><th>top-1 %</th><th>best %</th><th>eval loss</th>"
                "<th>train loss</th><th>images/s</th><th>kept/image</th><th>exact</th><th>peak</th><th>steps</th></tr></thead><tbody>\n",
                rows, "</tbody></table></div>\n", notes, charts_html(charts), memory_comparison(runs), differences(runs));
}

}  // namespace
}  // namespace report

std::string report_html(std::span<const RunRecord> runs) {
  check(!runs.empty(), "a report needs a run");
  const std::vector<report::Chart> charts = report::charts_of(runs);
  nlohmann::ordered_json data = nlohmann::ordered_json::object();
  for (const report::Chart& chart : charts) data[chart.id] = report::points_of(chart);
  const std::string body = runs.size() == 1 ? report::one_run(runs[0], charts) : report::comparison(runs, charts);
  return report::page(runs.size() == 1 ? runs[0].name : concat(runs.size(), " runs"), body,
                      data.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace));
}

std::string write_report(const std::vector<std::string>& folders, const std::string& path) {
  check(!folders.empty(), "a report needs a run's folder");
  std::vector<RunRecord> runs;
  std::map<std::string, int> names;
  for (const std::string& folder : folders) runs.push_back(read_run(folder));
  for (const RunRecord& run : runs) ++names[run.name];
  for (size_t i = 0; i < runs.size(); ++i)
    if (names[runs[i].name] > 1) runs[i].name = folders[i];
  const std::string to = !path.empty() ? path : folders.size() == 1 ? folders[0] + "/report.html" : "report.html";
  write_file_atomically(to, report_html(runs));
  return to;
}

}  // namespace mesa
