#include "run_watch.h"

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>

#include "mesa/train/report.h"
#include "mesa/train/version.h"

namespace mesa {
namespace {

constexpr double kWorthAWarning = 0.01;  // of the elements outside their range
constexpr double kReportShare = 0.02;    // of an epoch's time that a report after it may take

double share_of(const SiteRecord& s) { return s.elements > 0 ? static_cast<double>(s.saturated) / static_cast<double>(s.elements) : 0; }

std::string percent(double share) {
  char text[16];
  std::snprintf(text, sizeof text, "%.*f %%", share < 0.1 ? 1 : 0, 100 * share);
  return text;
}

}  // namespace

RunWatch::RunWatch(const Parts& parts, const std::optional<LogPosition>& position, Warn warn)
    : parts_(parts),
      resumed_at_(position ? std::optional(position->step) : std::nullopt),
      warn_(std::move(warn)),
      health_(parts.config.train.health_interval, parts.config.train.histograms, parts.policy),
      mistakes_(parts.data.class_names()),
      health_until_(resumed_at_) {
  if (!resumed_at_)  // of a run that is replaced
    for (const char* file : {"health.csv", "samples.json", "mistakes.json", "classes.csv", "confusion.json"}) {
      std::error_code ignored;
      std::filesystem::remove(parts.folder.path() + "/" + file, ignored);
    }
  attempt("environment.json", [&] { write_environment(); });
  if (parts.config.train.tensorboard)
    attempt("the event file", [&] { events_ = std::make_unique<EventLog>(parts_.folder.path(), resumed_at_ ? *resumed_at_ + 1 : 0); });
}

void check_histograms(const RunConfig& config, const ParamStore& params, const Plan& plan) {
  for (const std::string& glob : config.train.histograms) {
    std::vector<std::string> names;
    bool parameter = false, site = false;
    for (const Param& p : params.params()) parameter |= matches_any({glob}, p.name), names.push_back(p.name);
    for (const SiteRecord& s : plan.sites) site |= matches_any({glob}, s.site.name()), names.push_back(s.site.name());
    const std::string near = nearest(glob, names);
    if (!parameter && !site)
      config.refuse("train.histograms", "'", glob, "' matches no parameter and no site",
                    near.empty() ? "" : "; the nearest is '" + near + "'");
    if (!parameter && config.train.health_interval == 0)
      config.refuse("train.histograms", "'", glob, "' matches sites, which are looked at each train.health_interval steps, and that is 0");
  }
}

void RunWatch::warn_once(const std::string& topic, const std::string& text) {
  if (told_.insert(topic).second) warn_(text);
}

template <class F>
void RunWatch::attempt(const std::string& what, F&& write) {
  try {
    write();
  } catch (const std::exception& e) {
    warn_once(what, concat(what, " cannot be written: ", e.what(), "; training goes on"));
  }
}

/// No names of hosts, users or folders: a report may be shown around.
void RunWatch::write_environment() {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  std::istringstream lines(version_text(is_gpu(parts_.device)));
  for (std::string line; std::getline(lines, line);) {
    const size_t end = std::min(line.find(' '), line.size()), from = std::min(line.find_first_not_of(' ', end), line.size());
    json[line.substr(0, end)] = line.substr(from);
  }
  json["device"] = describe_device(parts_.config.device, parts_.device);
  json["threads"] = std::to_string(omp_get_max_threads());
  write_file_atomically(parts_.folder.path() + "/environment.json",
                        json.dump(1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n");
}

/// The first batch of a run; where it is resumed into another folder, the first one there.
void RunWatch::on_batch(const Batch& batch) {
  if (sampled_) return;
  sampled_ = true;
  const std::string path = parts_.folder.path() + "/samples.json";
  if (resumed_at_ && std::filesystem::exists(path)) return;
  attempt("samples.json", [&] { write_pictures(path, sample_pictures(batch, parts_.data.class_names())); });
}

void RunWatch::after_update(const UpdateResult& result, const TrainingState& state, double seconds, double wait) {
  if (!result.bad.empty()) {
    const std::string text = concat("step ", state.step, " of epoch ", state.epoch + 1, " is skipped: ", result.bad);
    if (told_.contains("bad step")) parts_.folder.warn(text);  // the log has all of them
    warn_once("bad step", text + ". Further steps of this kind are named in log.txt");
  }
  const bool first = fresh_ || state.batch <= parts_.config.train.accumulation;  // its wait is that of the loader's start
  fresh_ = false;
  if (const auto share = first ? std::nullopt : wait_.add(seconds, wait))
    warn_once("wait", concat("training waits for data ", percent(*share),
                             " of the time; more data.workers, smaller source pictures or less augmentation would help"));
  write_health(state.step, result.bad.empty());
}

/// A warning about the worst site comes once: it would be much the same after every epoch.
void RunWatch::watch_ranges() {
  const std::vector<SiteRecord> sites = parts_.policy.sites();
  parts_.folder.write_memory(sites);
  SiteRecord worst;
  for (const SiteRecord& site : sites)
    if (share_of(site) > share_of(worst)) worst = site;
  if (share_of(worst) > kWorthAWarning)
    warn_once("saturation", concat(percent(share_of(worst)), " of the elements of ", worst.site.name(),
                                   " lay outside its running range in this epoch, more than at any other site (memory.csv); range: current "
                                   "would keep them"));
  parts_.policy.reset_counts();
}

void RunWatch::write_health(int64_t step, bool good) {
  const auto found = health_.finish(step);
  if (!found || !good) return;
  attempt("health.csv", [&] {
    try {
      if (!health_log_) health_log_ = std::make_unique<HealthLog>(parts_.folder.path() + "/health.csv", health_until_);
      health_log_->append(found->rows);
      health_until_ = step;
    } catch (...) {
      health_log_.reset();  // opened anew, which cuts off a torn line
      throw;
    }
  });
  if (events_)
    attempt("the event file", [&] {
      for (const auto& [site, histogram] : found->histograms) events_->histogram(step, "site/" + site, histogram);
    });
}

void RunWatch::on_interval(const IntervalRow& r) {
  if (!r.rank_seconds.empty())
    if (const auto slow = stragglers_.add(r.rank_seconds, parts_.config.train.log_interval)) {
      char times[16];
      std::snprintf(times, sizeof times, "%.1f", slow->ratio);
      warn_once("straggler",
                concat("rank ", slow->rank, " takes ", times, " times as long for its part of a step as most ranks, and all wait ",
                       "for it (rank_seconds in metrics.jsonl); --check-comm tells its host and its threads"));
    }
  if (!events_) return;
  attempt("the event file", [&] {
    const std::pair<std::string, double> values[] = {{"train/loss", r.loss},
                                                     {"train/learning_rate", r.lr},
                                                     {"train/gradient_norm", r.grad_norm},
                                                     {"train/images_per_second", r.images_per_second},
                                                     {"train/data_wait", r.data_wait},
                                                     {"train/bad_steps", static_cast<double>(r.bad_steps)}};
    events_->scalars(r.step, values);
  });
}

void RunWatch::after_epoch(const EpochRow& r, const Confusion& confusion) {
  watch_ranges();
  const auto write = [&](const std::string& name, const std::string& text) {
    attempt(name, [&] { write_file_atomically(parts_.folder.path() + "/" + name, text); });
  };
  write("classes.csv", classes_csv(confusion));
  write("confusion.json", confusion_json(confusion, r.epoch));
  attempt("mistakes.json", [&] { write_pictures(parts_.folder.path() + "/mistakes.json", mistakes_.finish(r.epoch, r.step)); });
  if (events_)
    attempt("the event file", [&] {
      const std::pair<std::string, double> values[] = {{"epoch/train_loss", r.train_loss},
                                                       {"eval/loss", r.eval_loss},
                                                       {"eval/top1", r.eval_top1},
                                                       {"eval/top5", r.eval_top5},
                                                       {"memory/activation_bytes_per_image", r.activation_bytes_per_image},
                                                       {"memory/peak_bytes", static_cast<double>(r.peak_bytes)}};
      events_->scalars(r.step, values);
      write_histograms(r.step);
    });
  if (report_seconds_ <= kReportShare * r.seconds) write_report();
}

/// Values and, of what is trained, the gradients of the last update, before clipping. Where ranks share the optimizer, none has the sums of
/// all gradients.
void RunWatch::write_histograms(int64_t step) {
  const bool have_gradients = parts_.config.ranks == 1 || parts_.config.train.shard == "none";
  for (const Param& p : parts_.params.params()) {
    if (!matches_any(parts_.config.train.histograms, p.name)) continue;
    events_->histogram(step, "weight/" + p.name, histogram_of(p.value));
    if (have_gradients && p.trainable && p.grad_written) events_->histogram(step, "gradient/" + p.name, histogram_of(p.grad));
  }
}

void RunWatch::write_report() {
  const auto start = std::chrono::steady_clock::now();
  attempt("report.html", [&] { mesa::write_report({parts_.folder.path()}); });
  report_seconds_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace mesa
