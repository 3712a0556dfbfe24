#include "report_sections.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "mesa/tensor/memory.h"
#include "mesa/train/plan.h"

namespace mesa::report {
namespace {

constexpr size_t kMostSites = 24;  // shown one by one; the rest in one row

/// Adds a curve for each run; `name` is what its values are.
class Curves {
 public:
  Curves(Chart& chart, std::span<const RunRecord> runs) : chart_(chart), runs_(runs) {}

  template <class Row, class F>
  void add(const std::string& name, std::vector<Row> RunRecord::*rows, F&& value, bool second = false) {
    for (size_t i = 0; i < runs_.size(); ++i) {
      Curve c;
      c.name = runs_.size() == 1 ? name : runs_[i].name + (name.empty() ? "" : ", " + name);
      c.colour = runs_.size() == 1 ? (second ? 1 : 0) : static_cast<int>(i);
      c.dashed = second || (runs_.size() > 1 && i >= kColours);
      for (const Row& row : runs_[i].*rows) {
        c.x.push_back(static_cast<double>(row.step));
        c.y.push_back(value(row));
      }
      if (!c.x.empty()) chart_.curves.push_back(std::move(c));
    }
  }

 private:
  Chart& chart_;
  std::span<const RunRecord> runs_;
};

/// At each step that was looked at, the largest value over the sites of one codec.
std::vector<Curve> worst_by_codec(const RunRecord& run, double HealthRow::*value, double scale) {
  std::map<std::string, Curve> by_codec;
  for (const HealthRow& row : run.health) {
    if (std::isnan(row.*value) || row.codec == "exact") continue;
    Curve& c = by_codec.try_emplace(row.codec).first->second;
    const double x = static_cast<double>(row.step);
    if (c.x.empty() || c.x.back() != x) c.x.push_back(x), c.y.push_back(0);
    c.y.back() = std::max(c.y.back(), scale * row.*value);
  }
  std::vector<Curve> out;
  for (auto& [codec, curve] : by_codec) {
    curve.name = codec;
    curve.colour = static_cast<int>(out.size());
    out.push_back(std::move(curve));
  }
  return out;
}

struct Bar {
  std::string label;
  int64_t sites = 0, exact = 0;
  std::map<std::string, int64_t> kept;  // by codec
  int64_t kept_bytes() const {
    int64_t sum = 0;
    for (const auto& [codec, bytes] : kept) sum += bytes;
    return sum;
  }
};

/// Sites of equal blocks together, the largest first.
std::vector<Bar> bars_of(const RunRecord& run) {
  std::map<std::string, Bar> by_site;
  for (const MemoryRow& row : run.memory) {
    Bar& bar = by_site[fold_site(row.site)];
    ++bar.sites;
    bar.exact += row.exact_bytes;
    bar.kept[row.codec] += row.kept_bytes;
  }
  std::vector<Bar> bars;
  for (auto& [site, bar] : by_site) {
    bar.label = site;
    bars.push_back(std::move(bar));
  }
  std::erase_if(bars, [](const Bar& bar) { return bar.exact == 0 && bar.kept_bytes() == 0; });
  std::stable_sort(bars.begin(), bars.end(), [](const Bar& a, const Bar& b) { return a.exact > b.exact; });
  if (bars.size() <= kMostSites) return bars;
  Bar rest;
  rest.label = "other sites";
  for (size_t i = kMostSites; i < bars.size(); ++i) {
    rest.sites += bars[i].sites, rest.exact += bars[i].exact;
    for (const auto& [codec, bytes] : bars[i].kept) rest.kept[codec] += bytes;
  }
  bars.resize(kMostSites);
  bars.push_back(std::move(rest));
  return bars;
}

/// A colour for each codec that keeps something.
std::map<std::string, int> colours_of(const std::vector<Bar>& bars) {
  std::map<std::string, int> colours;
  for (const Bar& bar : bars)
    for (const auto& [codec, bytes] : bar.kept)
      if (bytes > 0) colours.emplace(codec, 0);
  int next = 0;
  for (auto& [codec, colour] : colours) colour = next++ % kColours;
  return colours;
}

std::string width(int64_t part, int64_t whole) {
  char text[32];
  std::snprintf(text, sizeof text, "width:%.2f%%", whole > 0 ? 100 * static_cast<double>(part) / static_cast<double>(whole) : 0.0);
  return text;
}

std::string draw(const Bar& bar, int64_t widest, const std::map<std::string, int>& colours) {
  std::string codecs, parts;
  for (const auto& [codec, bytes] : bar.kept) {
    codecs += (codecs.empty() ? "" : ", ") + codec;
    if (bytes > 0) parts += concat("<i class=\"c", colours.at(codec), "\" style=\"", width(bytes, widest), "\"></i>");
  }
  const std::string times = bar.sites > 1 ? concat(" (", bar.sites, " sites)") : "";
  return "<div><div class=\"label\"><span>" + escape(bar.label + times) + "</span><span>" +
         escape(concat(format_bytes(bar.exact), ", ", format_bytes(bar.kept_bytes()), " kept", codecs.empty() ? "" : " (" + codecs + ")")) +
         "</span></div><div class=\"bar\"><i class=\"exact\" style=\"" + width(bar.exact, widest) + "\"></i></div><div class=\"bar\">" +
         parts + "</div></div>\n";
}

std::string draw(const std::vector<Bar>& bars) {
  const std::map<std::string, int> colours = colours_of(bars);
  int64_t widest = 1;
  for (const Bar& bar : bars) widest = std::max({widest, bar.exact, bar.kept_bytes()});
  std::string keys = "<span class=\"key\"><i class=\"box exact\"></i>the values</span> ", rows;
  for (const auto& [codec, colour] : colours)
    keys += concat("<span class=\"key\"><i class=\"box c", colour, "\"></i>", escape(codec), "</span> ");
  for (const Bar& bar : bars) rows += draw(bar, widest, colours);
  return "<p class=\"legend\">" + keys + "</p>\n<div class=\"bars\">\n" + rows + "</div>\n";
}

std::string draw(const LabelledPicture& p, bool predictions) {
  std::string says = "<strong>" + escape(p.name) + "</strong>", alt = "picture " + std::to_string(p.index) + ": " + p.name;
  if (predictions) {
    char confidence[32];
    std::snprintf(confidence, sizeof confidence, " (%.0f %%)", 100 * p.confidence);
    says += "<br/><span class=\"wrong\">" + escape(p.predicted_name) + "</span>" + confidence;
    alt += ", taken for " + p.predicted_name;
  }
  return "<li><img alt=\"" + escape(alt) + "\" src=\"data:image/png;base64," + to_base64(p.png) + "\"/>" + says + "</li>\n";
}

std::string draw(const PictureList& list) {
  std::string out;
  for (const LabelledPicture& p : list.pictures) out += draw(p, list.predictions);
  return "<ul class=\"pictures\">\n" + out + "</ul>\n";
}

}  // namespace

std::vector<Chart> charts_of(std::span<const RunRecord> runs) {
  std::vector<Chart> charts;
  charts.reserve(8);  // Curves refer to them
  const auto chart = [&](const char* id, const char* title, bool log, bool from_zero) {
    charts.push_back({id, title, log, from_zero, {}});
    return Curves(charts.back(), runs);
  };
  Curves loss = chart("loss", "Loss", true, false);
  loss.add("train", &RunRecord::intervals, [](const IntervalRow& r) { return r.loss; });
  loss.add(
      "eval", &RunRecord::epochs, [](const EpochRow& r) { return r.eval_loss; }, true);
  Curves accuracy = chart("accuracy", "Accuracy on the test set (%)", false, false);
  accuracy.add("top-1", &RunRecord::epochs, [](const EpochRow& r) { return r.eval_top1; });
  accuracy.add(
      "top-5", &RunRecord::epochs, [](const EpochRow& r) { return r.eval_top5; }, true);
  const auto name = [&](const char* text) { return std::string(runs.size() == 1 ? text : ""); };  // several curves have the runs' names
  chart("lr", "Learning rate", false, true).add(name("learning rate"), &RunRecord::intervals, [](const IntervalRow& r) { return r.lr; });
  chart("grad-norm", "Norm of the gradient", true, true).add(name("norm"), &RunRecord::intervals, [](const IntervalRow& r) {
    return r.grad_norm;
  });
  chart("rate", "Images per second", false, true).add(name("images/s"), &RunRecord::intervals, [](const IntervalRow& r) {
    return r.images_per_second;
  });
  chart("wait", "Waiting for data (% of the time)", false, true).add(name("waiting"), &RunRecord::intervals, [](const IntervalRow& r) {
    return 100 * r.data_wait;
  });
  if (runs.size() == 1 && !runs[0].health.empty()) {
    charts.push_back({"error", "Relative error of what is stored, worst site of each codec", true, true,
                      worst_by_codec(runs[0], &HealthRow::relative_error, 1)});
    charts.push_back({"clamped", "Elements outside their range, worst site of each codec (%)", false, true,
                      worst_by_codec(runs[0], &HealthRow::clamped, 100)});
  }
  return charts;
}

std::string memory_section(const RunRecord& run) {
  if (run.memory.empty()) return "";
  const std::vector<Bar> bars = bars_of(run);
  const double kept = run.summary.activation_bytes_per_image, exact = run.summary.exact_activation_bytes_per_image;
  std::string total;
  if (run.has_summary && kept > 0 && exact > 0 && kept < 1e18 && exact < 1e18)
    total =
        concat("In all ", format_bytes(std::llround(kept)),
               " are kept per image; exact storage, which shares and rebuilds too, would keep ", format_bytes(std::llround(exact)), ". ");
  return "<h2>Activations kept for the backward pass</h2>\n<p class=\"soft\">" + escape(total) +
         "Bytes of one batch by site, blocks taken together: grey what the values themselves take, below it what is kept of them.</p>\n" +
         draw(bars);
}

std::string memory_comparison(std::span<const RunRecord> runs) {
  std::vector<Bar> bars;
  for (const RunRecord& run : runs) {
    Bar bar;
    bar.label = run.name;
    for (const MemoryRow& row : run.memory) {
      bar.exact += row.exact_bytes;
      bar.kept[row.codec] += row.kept_bytes;
    }
    std::erase_if(bar.kept, [](const auto& part) { return part.second == 0; });
    if (!run.memory.empty()) bars.push_back(std::move(bar));
  }
  if (bars.empty()) return "";
  return "<h2>Activations kept for the backward pass</h2>\n<p class=\"soft\">Bytes of one batch: grey what the values of all sites take, "
         "each "
         "counted by itself; below it what is kept of them, by codec.</p>\n" +
         draw(bars);
}

std::string health_section(const RunRecord& run) {
  if (run.health.empty()) return "";
  const int64_t last = run.health.back().step;
  std::vector<HealthRow> rows;
  for (const HealthRow& row : run.health)
    if (row.step == last) rows.push_back(row);
  const auto known = [](const HealthRow& row) { return std::isnan(row.relative_error) ? -1 : row.relative_error; };
  std::stable_sort(rows.begin(), rows.end(), [&](const auto& a, const auto& b) { return known(a) > known(b); });
  std::string html;
  for (size_t i = 0; i < std::min(rows.size(), kMostSites); ++i)
    html += "<tr><td>" + escape(rows[i].site) + "</td><td>" + escape(rows[i].codec) + "</td><td>" +
            escape(short_number(100 * rows[i].relative_error)) + "</td><td>" + escape(short_number(100 * rows[i].clamped)) + "</td></tr>\n";
  return concat("<h2>Health of the storage</h2>\n<p class=\"soft\">The ", std::min(rows.size(), kMostSites),
                " sites with the largest error at step ", last, ", of ", rows.size(),
                "; health.csv has all.</p>\n<div class=\"scroll\"><table><thead><tr><th>site</th><th>codec</th>"
                "<th>relative error %</th><th>outside the range %</th></tr></thead><tbody>\n",
                html, "</tbody></table></div>\n");
}

std::string pictures_section(const RunRecord& run) {
  std::string out;
  if (!run.samples.pictures.empty())
    out += concat("<h2>Training pictures</h2>\n<p class=\"soft\">From the first batch of epoch ", run.samples.epoch,
                  ", after augmentation and before normalization.</p>\n", draw(run.samples));
  if (!run.mistakes.pictures.empty())
    out += concat("<h2>Mistakes on the test set</h2>\n<p class=\"soft\">The first ones after epoch ", run.mistakes.epoch,
                  ": the label, and what the model says instead.</p>\n", draw(run.mistakes));
  return out;
}

}  // namespace mesa::report
