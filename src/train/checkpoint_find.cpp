// Which checkpoint is meant: of a run, of a path, the newest that is whole.
#include <algorithm>
#include <charconv>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>

#include "checkpoint_files.h"
#include "mesa/base/files.h"
#include "mesa/train/files.h"

namespace mesa {
namespace fs = std::filesystem;

static constexpr std::string_view kHistory = "step-";

std::string history_name(int64_t step) {
  const std::string digits = std::to_string(step);
  return concat(kHistory, std::string(8 - std::min<size_t>(8, digits.size()), '0'), digits);
}

std::vector<int64_t> history_of(const std::string& folder) {
  std::vector<int64_t> steps;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(folder, ignored)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(kHistory)) continue;
    int64_t step = 0;
    std::from_chars(name.data() + kHistory.size(), name.data() + name.size(), step);
    if (name == history_name(step)) steps.push_back(step);
  }
  std::sort(steps.rbegin(), steps.rend());
  return steps;
}

/// What cannot be removed, such as another user's file, keeps nobody from what is whole.
static void recover_if_possible(const std::string& folder) {
  try {
    recover_folder(folder);
  } catch (const Error&) {
  }
}

void remove_history_leftovers(const std::string& folder) {
  std::vector<std::string> leftovers;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with(kHistory) && name.ends_with(".tmp")) leftovers.push_back(entry.path().string());
  }
  for (const std::string& path : leftovers) recover_if_possible(path.substr(0, path.size() - 4));
}

int64_t step_of(const std::string& checkpoint) { return static_cast<int64_t>(number_of(checkpoint, "step", -1)); }

double number_of(const std::string& checkpoint, const char* field, double otherwise) try {
  const auto state = nlohmann::json::parse(read_text(checkpoint + "/" + kStateFile), nullptr, false);
  return state.is_object() && state.contains(field) && state[field].is_number() ? state[field].get<double>() : otherwise;
} catch (const Error&) {  // not there, or cannot be read
  return otherwise;
}

/// By which the newer of two checkpoints is told: a later step of a branch that was left does not count.
static std::pair<int64_t, int64_t> age_of(const std::string& checkpoint) {
  return {static_cast<int64_t>(number_of(checkpoint, "branch", 0)), step_of(checkpoint)};
}

/// The checkpoints in checkpoints/ of a run from the newest; of two of one moment `last` goes first.
static std::vector<std::string> from_newest(const std::string& folder) {
  constexpr int64_t kUnknown =
      std::numeric_limits<int64_t>::max();  // `last` is by its name the newest: whoever tries it tells what is wrong
  std::vector<std::pair<std::pair<int64_t, int64_t>, std::string>> found;
  const auto add = [&](const std::string& name) {
    const std::string path = folder + "/" + name;
    if (!fs::is_directory(path)) return;
    found.emplace_back(name == "last" && step_of(path) < 0 ? std::pair(kUnknown, kUnknown) : age_of(path), path);
  };
  // ".old": where a folder waits while it is being replaced on file systems that cannot exchange two.
  for (const char* name : {"last", "last.old", "best", "best.old"}) add(name);
  for (const int64_t step : history_of(folder)) add(history_name(step));
  std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  std::vector<std::string> out;
  for (auto& [age, path] : found) out.push_back(std::move(path));
  return out;
}

int64_t branch_after(const std::string& resumed, const std::string& folder) {
  const auto from = age_of(resumed);
  int64_t branch = from.first;
  for (const std::string& checkpoint : from_newest(folder))
    if (const auto age = age_of(checkpoint); age > from) branch = std::max(branch, age.first + 1);
  return branch;
}

std::string resolve_checkpoint(const std::string& path, const std::string& prefer) {
  check(fs::exists(path), "there is no checkpoint at ", path);
  if (fs::is_regular_file(path)) return path;
  const std::string run = path + "/checkpoints";
  std::vector<std::string> candidates{path};
  if (prefer == "best") candidates.insert(candidates.end(), {run + "/best", run + "/best.old"});
  for (std::string& checkpoint : from_newest(run)) candidates.push_back(std::move(checkpoint));
  for (const std::string& candidate : candidates)
    if (fs::is_regular_file(candidate + "/" + kModelFile)) return candidate;
  fail("", path, " is neither a checkpoint (no ", kModelFile, " in it) nor a run's folder (no checkpoints/last)");
}

std::string weights_file(const std::string& path, WeightsKind kind, bool verify) {
  const std::string at = resolve_checkpoint(path, "best");
  const bool average = fs::exists(at + "/" + kEmaFile);
  if (kind == WeightsKind::ema)
    check(average, at,
          fs::is_directory(at) ? " has no moving average of its weights (train.ema_decay was 0)"
                               : " is a file, and only a checkpoint's folder leaves a choice among its weights");
  const bool averaged = kind != WeightsKind::raw && average;
  const std::string file = fs::is_directory(at) ? at + "/" + (averaged ? kEmaFile : kModelFile) : at;
  const std::string folder = fs::absolute(file).parent_path().string();
  if (verify && (fs::is_directory(at) || fs::exists(folder + "/" + kStateFile)))
    verify_folder(folder);  // a file taken out of its checkpoint stands alone
  return file;
}

/// What --resume considers in a run's folder, from the newest. Mends what a crash left of `last` and `best`.
static std::vector<std::string> candidates(const std::string& folder) {
  if (!fs::is_directory(folder)) return {};
  remove_history_leftovers(folder);
  for (const char* name : {"/last", "/best"}) recover_if_possible(folder + name);
  return from_newest(folder);
}

std::string find_checkpoint(const std::string& wish, const std::string& output, const std::function<void(const std::string&)>& warn) {
  if (wish.empty()) return "";
  if (wish != "auto") return resolve_checkpoint(wish, "last");
  bool rejected = false;
  for (const std::string& folder : candidates(output + "/checkpoints")) try {
      verify_folder(folder);
      if (rejected) warn(concat("going back to ", folder));
      return folder;
    } catch (const Error& e) {
      warn(concat(folder, " cannot be used: ", e.what()));
      rejected = true;
    }
  if (rejected) throw Error(concat("no checkpoint of ", output, " is whole; start again with another --output"));
  return "";
}

}  // namespace mesa
