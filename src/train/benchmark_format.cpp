// A benchmark's result as tables and as JSON.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "mesa/train/benchmark.h"

namespace mesa {
namespace {

using nlohmann::ordered_json;

/// Rows of cells, each column as wide as its widest cell; the first is set to the left, numbers to the right.
std::string align(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths(rows.front().size());
  for (const auto& row : rows)
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  std::string out;
  for (const auto& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) {
      const std::string space(widths[i] - row[i].size(), ' ');
      out += i == 0 ? row[i] + space : "  " + space + row[i];
    }
    out += "\n";
  }
  return out;
}

std::string number(const char* format, double value) {
  char text[64];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

std::string bytes_text(double bytes) { return format_bytes(static_cast<int64_t>(std::llround(bytes))); }

ordered_json json_of(const Spread& s) { return {{"minimum", s.minimum}, {"median", s.median}, {"maximum", s.maximum}}; }

ordered_json json_of(const SiteRecord& record) {
  return {{"name", record.site.name()},        {"shape", std::vector<int64_t>(record.shape.begin(), record.shape.end())},
          {"dtype", to_string(record.dtype)},  {"codec", record.codec},
          {"exact_bytes", record.exact_bytes}, {"kept_bytes", record.kept_bytes}};
}

ordered_json json_of(const PolicyResult& policy) {
  ordered_json out;
  out["storage"] = policy.storage;
  out["images_per_second"] = json_of(policy.images_per_second);
  out["relative_speed"] = json_of(policy.relative_speed);
  out["step_ms"] = json_of(policy.step_ms);
  out["forward_ms"] = json_of(policy.forward_ms);
  out["backward_ms"] = json_of(policy.backward_ms);
  out["optimizer_ms"] = json_of(policy.optimizer_ms);
  out["activation_bytes_per_image"] = json_of(policy.activation_bytes_per_image);
  out["peak_bytes"] = json_of(policy.peak_bytes);
  out["gradient_relative_error"] = json_of(policy.gradient_relative_error);
  for (int kind = 0; kind < kMemoryKinds; ++kind)
    out["bytes_by_kind"][to_string(static_cast<MemoryKind>(kind))] = policy.bytes_by_kind[kind];
  if (!policy.profile.empty()) {
    out["profile"] = ordered_json::array();
    for (const cuda::ProfileRow& row : policy.profile) out["profile"].push_back({{"name", row.name}, {"calls", row.calls}, {"ms", row.ms}});
  }
  out["sites"] = ordered_json::array();
  for (const SiteRecord& record : policy.sites) out["sites"].push_back(json_of(record));
  return out;
}

/// The kernels of a step, the longest first.
std::string format_profile(const PolicyResult& policy) {
  double all = 0;
  for (const cuda::ProfileRow& row : policy.profile) all += row.ms;
  std::vector<std::vector<std::string>> rows{{concat("kernels of a step, ", policy.storage), "calls", "ms", "share"}};
  for (const cuda::ProfileRow& row : policy.profile)
    rows.push_back({row.name, std::to_string(row.calls), number("%.3f", row.ms), number("%.1f %%", all > 0 ? 100 * row.ms / all : 0)});
  rows.push_back({concat("all, beside a step of ", number("%.3f", policy.step_ms.median), " ms"), "", number("%.3f", all), ""});
  return concat("\n", align(rows));
}

}  // namespace

std::string format_benchmark(const BenchmarkResult& result) {
  const char* const threads = result.threads == 1 ? " thread, " : " threads, ";
  std::string out = concat(result.model, ": ", result.parameters, " parameters, batch ", result.batch_size, ", ", result.precision, ", ");
  out += concat(result.device, " (", result.threads, threads, result.isa, ", ", result.matmul, ")\n");
  out += concat("medians of ", result.steps, " steps after ", result.warmup, " to warm up; speed is relative to ");
  out += concat(result.policies.front().storage, ", step against step\n\n");
  std::vector<std::vector<std::string>> speed{{"storage", "images/s", "[min", "max]", "speed", "step ms", "forward", "backward",
                                               "optimizer", "kept/image", "of exact", "peak", "gradient error"}};
  std::vector<std::vector<std::string>> kinds{{"bytes at the peak"}};
  for (int kind = 0; kind < kMemoryKinds; ++kind) kinds.front().push_back(to_string(static_cast<MemoryKind>(kind)));
  for (const PolicyResult& p : result.policies) {
    const double kept = p.activation_bytes_per_image.median, exact = result.exact_activation_bytes_per_image;
    speed.push_back({p.storage, number("%.2f", p.images_per_second.median)});
    const auto add = [&](const char* format, double value) { speed.back().push_back(number(format, value)); };
    add("[%.2f", p.images_per_second.minimum), add("%.2f]", p.images_per_second.maximum), add("%.3f", p.relative_speed.median);
    for (const Spread& ms : {p.step_ms, p.forward_ms, p.backward_ms, p.optimizer_ms}) add("%.1f", ms.median);
    speed.back().push_back(bytes_text(kept));
    add("%.1f %%", exact > 0 ? 100 * kept / exact : 0);
    speed.back().push_back(bytes_text(p.peak_bytes.median));
    add("%.3g", p.gradient_relative_error.median);
    kinds.push_back({p.storage});
    for (int64_t bytes : p.bytes_by_kind) kinds.back().push_back(format_bytes(bytes));
  }
  out += align(speed) + "\n" + align(kinds);
  for (const PolicyResult& p : result.policies)
    if (!p.profile.empty()) out += format_profile(p);
  return out;
}

std::string benchmark_json(const BenchmarkResult& result) {
  ordered_json out;
  out["model"] = result.model;
  out["parameters"] = result.parameters;
  out["batch_size"] = result.batch_size;
  out["precision"] = result.precision;
  out["device"] = result.device;
  out["threads"] = result.threads;
  out["isa"] = result.isa;
  out["matmul"] = result.matmul;
  out["steps"] = result.steps;
  out["warmup"] = result.warmup;
  out["exact_activation_bytes_per_image"] = result.exact_activation_bytes_per_image;
  out["policies"] = ordered_json::array();
  for (const PolicyResult& policy : result.policies) out["policies"].push_back(json_of(policy));
  return out.dump(2) + "\n";
}

}  // namespace mesa
