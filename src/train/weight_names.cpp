#include "weight_names.h"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <map>
#include <string_view>
#include <utility>

#include "mesa/base/error.h"

namespace mesa {
namespace {

constexpr size_t kInOneLine = 4;

/// An item around the number that may differ: "missing blocks." 3 ".norm1.weight [192]"; number is -1 where there is none.
struct Parts {
  std::string before, after;
  int64_t number = -1;
};

Parts split(const std::string& item) {
  for (size_t end = item.rfind('.'); end != std::string::npos && end > 0; end = item.rfind('.', end - 1)) {
    const size_t begin = item.find_last_of(". ", end - 1) + 1;  // 0 where there is none
    int64_t number = 0;
    const auto [stop, code] = std::from_chars(item.data() + begin, item.data() + end, number);
    if (end > begin && code == std::errc{} && stop == item.data() + end && number >= 0)
      return {item.substr(0, begin), item.substr(end), number};
  }
  return {item, "", -1};
}

/// "3", "[0-2,5]"
std::string ranges(std::vector<int64_t> numbers) {
  std::sort(numbers.begin(), numbers.end());
  if (numbers.size() == 1) return std::to_string(numbers[0]);
  std::string out;
  for (size_t i = 0; i < numbers.size();) {
    size_t last = i;
    while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) ++last;
    out += concat(out.empty() ? "" : ",", numbers[i]);
    if (last > i) out += concat("-", numbers[last]);
    i = last + 1;
  }
  return concat("[", out, "]");
}

void strip_wrappers(SafetensorsFile& file) {
  const auto strip = [&](const std::string& prefix) {
    const auto begins = [&](const NamedTensor& t) { return t.name.size() > prefix.size() && t.name.starts_with(prefix); };
    if (file.tensors.empty() || !std::all_of(file.tensors.begin(), file.tensors.end(), begins)) return false;
    for (NamedTensor& tensor : file.tensors) tensor.name.erase(0, prefix.size());
    return true;
  };
  while (strip("module.") || strip("_orig_mod.") || strip("model.")) continue;
}

/// "layers.0.downsample.norm.weight" as "layers.1.downsample.norm.weight".
void rename_original_swin(std::string& name) {
  constexpr std::string_view kLayers = "layers.", kPart = ".downsample.";
  if (name == "head.weight" || name == "head.bias") name.insert(4, ".fc");
  const size_t end = name.find(kPart);
  if (!name.starts_with(kLayers) || end == std::string::npos) return;
  int stage = 0;
  const auto [stop, code] = std::from_chars(name.data() + kLayers.size(), name.data() + end, stage);
  if (code == std::errc{} && stop == name.data() + end && stage >= 0 && stage < 100) name = concat(kLayers, stage + 1, name.substr(end));
}

/// "blocks.0.gamma_1" as "blocks.0.ls1.gamma".
void rename_original_deit3(std::string& name) {
  for (const auto& [original, here] : {std::pair(".gamma_1", ".ls1.gamma"), std::pair(".gamma_2", ".ls2.gamma")})
    if (name.starts_with("blocks.") && name.ends_with(original)) name.replace(name.rfind('.'), std::string::npos, here);
}

}  // namespace

void rename_as_here(SafetensorsFile& file) {
  strip_wrappers(file);
  const auto any = [&](const std::string& part) {
    return std::any_of(file.tensors.begin(), file.tensors.end(),
                       [&](const NamedTensor& t) { return t.name.find(part) != std::string::npos; });
  };
  const bool original_swin = any("layers.0.downsample."), others = any(".attn.proj_l.") || any(".gamma_1_1");  // CaiT, parallel blocks
  for (NamedTensor& tensor : file.tensors) {
    if (original_swin) rename_original_swin(tensor.name);
    if (!others) rename_original_deit3(tensor.name);
  }
}

bool is_derived(const std::string& name) {
  const std::string last = name.substr(name.rfind('.') + 1);
  return last == "num_batches_tracked" || last == "relative_position_index" || last == "attn_mask";
}

std::string list_all(const std::vector<std::string>& items) {
  struct Line {
    Parts parts;
    std::vector<int64_t> numbers;
  };
  std::vector<Line> lines;
  std::map<std::pair<std::string, std::string>, size_t> where;
  for (const std::string& item : items) {
    Parts parts = split(item);
    const auto [found, is_new] = where.emplace(std::pair(parts.before, parts.after), lines.size());
    if (is_new) lines.push_back({parts, {}});
    lines[found->second].numbers.push_back(parts.number);
  }
  std::string out;
  for (const Line& line : lines) {
    const std::string number = line.parts.number < 0 ? "" : ranges(line.numbers);
    out += concat(lines.size() > kInOneLine ? "\n  " : out.empty() ? "" : "; ", line.parts.before, number, line.parts.after);
  }
  return out;
}

}  // namespace mesa
