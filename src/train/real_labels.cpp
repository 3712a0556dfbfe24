#include "mesa/train/real_labels.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>
#include <unordered_map>

#include "mesa/base/files.h"

namespace mesa {
namespace {

using nlohmann::json;

constexpr int64_t kMostBytes = 512 << 20;
constexpr int kMostDepth = 2;  // {name: [classes]}
constexpr std::string_view kImageNet = "ILSVRC2012_val_";
constexpr size_t kImageNetDigits = 8;

json parse_file(const std::string& path) {
  const std::string text = read_text(path, kMostBytes);
  const auto shallow = [&](int depth, json::parse_event_t, json&) {
    check(depth <= kMostDepth, path, ": is nested deeper than lists of classes are");
    return true;
  };
  try {
    return json::parse(text.begin(), text.end(), shallow);
  } catch (const json::exception& e) {
    fail("", path, ": is not valid JSON (", std::string(e.what()).substr(0, 300), ")");
  }
}

std::vector<int32_t> classes_of(const json& entry, int64_t classes, const std::string& path, const std::string& name) {
  check(entry.is_array(), path, ": ", name, " is no list of classes");
  std::vector<int32_t> out;
  for (const json& label : entry) {
    check(label.is_number_integer(), path, ": ", name, " holds ", label.dump().substr(0, 40), ", which is no class number");
    const bool good = label.is_number_unsigned() ? label.get<uint64_t>() < static_cast<uint64_t>(classes) : label.get<int64_t>() >= 0;
    check(good, path, ": ", name, " has class ", label.dump(), ", but the model has classes 0 to ", classes - 1);
    out.push_back(label.get<int32_t>());
  }
  return out;
}

std::string without_ending(const std::string& name) {
  const size_t dot = name.rfind('.'), slash = name.rfind('/');
  return dot == std::string::npos || dot == 0 || (slash != std::string::npos && dot < slash) ? name : name.substr(0, dot);
}

/// What stands behind the last '/' or ": ".
std::string name_of(const std::string& described) {
  const size_t slash = described.rfind('/'), colon = described.rfind(": ");
  const size_t after_slash = slash == std::string::npos ? 0 : slash + 1, after_colon = colon == std::string::npos ? 0 : colon + 2;
  return described.substr(std::max(after_slash, after_colon));
}

/// The folder in front of the name, too.
std::string with_folder(const std::string& described) {
  const size_t slash = described.rfind('/');
  if (slash == std::string::npos || slash == 0) return described;
  const size_t before = described.find_last_of("/ ", slash - 1);
  return described.substr(before == std::string::npos ? 0 : before + 1);
}

/// The number in ILSVRC2012_val_00000017, counted from 0.
std::optional<size_t> imagenet_number(const std::string& name) {
  const std::string stem = without_ending(name), digits = stem.substr(std::min(kImageNet.size(), stem.size()));
  if (!stem.starts_with(kImageNet) || digits.size() != kImageNetDigits) return std::nullopt;
  if (!std::all_of(digits.begin(), digits.end(), [](char c) { return c >= '0' && c <= '9'; })) return std::nullopt;
  const size_t number = std::stoul(digits);
  if (number == 0) return std::nullopt;
  return number - 1;
}

/// The key of the object that stands for a picture, or "".
std::string key_of(const json& object, const std::string& described) {
  for (const std::string& name : {with_folder(described), name_of(described)})
    for (const std::string& key : {name, without_ending(name)})
      if (object.contains(key)) return key;
  return "";
}

}  // namespace

RealLabels::RealLabels(const std::string& path, const Dataset& test, int64_t classes) {
  const json file = parse_file(path);
  check(file.is_array() || file.is_object(), path, ": is neither a list of lists of classes nor an object from names to such lists");
  std::unordered_map<std::string, int64_t> owners;
  for (int64_t i = 0; i < test.size(); ++i) {
    const std::string described = test.describe(i);
    std::string key;
    const json* entry = nullptr;
    if (file.is_array()) {
      const auto number = imagenet_number(name_of(described));
      check(number.has_value(), path, ": is a list for the pictures ILSVRC2012_val_00000001 and on, and ", described,
            " is none of them; for other pictures an object from names to lists is needed");
      check(*number < file.size(), path, ": has ", file.size(), " entries, none for ", described);
      key = std::to_string(*number), entry = &file[*number];
    } else {
      key = key_of(file, described);
      check(!key.empty(), path, ": has no entry '", name_of(described), "' (nor '", with_folder(described), "') for ", described);
      entry = &file[key];
    }
    const auto [owner, is_new] = owners.emplace(key, i);
    check(is_new, path, ": entry '", key, "' would stand for two pictures, ", test.describe(owner->second), " and ", described);
    labels_.push_back(classes_of(*entry, classes, path, concat("entry ", key, " (", name_of(described), ")")));
  }
}

void RealLabels::take(const Batch& batch, const Tensor& logits) {
  const int64_t classes = logits.dim(1);
  for (int64_t b = 0; b < logits.dim(0); ++b) {
    const auto& right = labels_.at(static_cast<size_t>(batch.sample_indices.at(static_cast<size_t>(b))));
    const float* row = logits.data<float>() + b * classes;
    const auto among = [&](int64_t k) {
      return std::any_of(right.begin(), right.end(), [&](int32_t label) { return is_among_best(row, classes, label, k); });
    };
    right.empty() ? ++unlabelled_ : ++images_;
    hits_ += among(1), hits5_ += among(5);
  }
}

RealResult RealLabels::finish(const AddUp& add_up) {
  std::vector<double> sums{hits_, hits5_, images_, unlabelled_};
  if (add_up) add_up(sums);
  hits_ = hits5_ = images_ = unlabelled_ = 0;
  const double n = std::max(sums[2], 1.0);
  return {100 * sums[0] / n, 100 * sums[1] / n, std::llround(sums[2]), std::llround(sums[3])};
}

}  // namespace mesa
