// timm's strings for RandAugment and 3-Augment.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <set>
#include <string_view>

#include "mesa/base/error.h"
#include "mesa/data/augment.h"

namespace mesa {
namespace {
using Op = AugmentOp;
using Choices = std::vector<AugmentPolicy::Choice>;

Choices equally(std::initializer_list<Op> ops) {
  Choices choices;
  for (Op op : ops) choices.push_back({op});
  return choices;
}

Choices standard() {
  return equally({Op::auto_contrast, Op::equalize, Op::invert, Op::rotate, Op::posterize, Op::solarize, Op::solarize_add, Op::color,
                  Op::contrast, Op::brightness, Op::sharpness, Op::shear_x, Op::shear_y, Op::translate_x, Op::translate_y});
}

Choices increasing() {
  return equally({Op::auto_contrast, Op::equalize, Op::invert, Op::rotate, Op::posterize_increasing, Op::solarize_increasing,
                  Op::solarize_add, Op::color_increasing, Op::contrast_increasing, Op::brightness_increasing, Op::sharpness_increasing,
                  Op::shear_x, Op::shear_y, Op::translate_x, Op::translate_y});
}

/// timm's _RAND_WEIGHTED_0.
Choices weighted() {
  return {{Op::rotate, 3},
          {Op::shear_x, 2},
          {Op::shear_y, 2},
          {Op::translate_x, 1},
          {Op::translate_y, 1},
          {Op::color_increasing, .25},
          {Op::sharpness_increasing, .25},
          {Op::auto_contrast, .25},
          {Op::solarize_increasing, .05},
          {Op::solarize_add, .05},
          {Op::contrast_increasing, .05},
          {Op::brightness_increasing, .05},
          {Op::equalize, .05},
          {Op::posterize_increasing, .05},
          {Op::invert, .05}};
}

/// timm's _RAND_WEIGHTED_3A.
Choices weighted_3a() {
  return {{Op::solarize_increasing, 6},
          {Op::desaturate, 6},
          {Op::gaussian_blur, 6},
          {Op::rotate, 3},
          {Op::shear_x, 2},
          {Op::shear_y, 2},
          {Op::posterize_increasing},
          {Op::auto_contrast},
          {Op::color_increasing},
          {Op::sharpness_increasing},
          {Op::contrast_increasing},
          {Op::brightness_increasing},
          {Op::equalize},
          {Op::invert}};
}

/// One of grayscale, solarize at 128 and Gaussian blur of a standard deviation in 0.1..2 pixels.
AugmentPolicy three_augment() {
  AugmentPolicy policy;
  policy.choices = {{Op::solarize, 1, 5}, {Op::desaturate, 1, 10}, {Op::gaussian_blur_rand, 1, 10}};
  policy.layers = 1;
  policy.probability = 1;
  return policy;
}

constexpr const char* kParts = "m, mstd, mmax, n, p, inc1, tweights, t3a and t3aw";

/// One "rand-..." text, part by part.
struct Reader {
  const std::string &text, &key;
  AugmentPolicy policy;
  double magnitude = 10;
  bool increasing = false;
  std::string list;
  std::set<std::string_view> seen;

  template <class... Words>
  [[noreturn]] void refuse(const Words&... words) const {
    throw Error(concat(key, ": '", text, "': ", words...));
  }

  template <class T>
  T number(std::string_view name, std::string_view value, T low, T high) const {
    T x{};
    const char* end = value.data() + value.size();
    const auto result = std::from_chars(value.data(), end, x);
    // Written so that not-a-number is refused, too.
    if (result.ec != std::errc{} || result.ptr != end || !(x >= low && x <= high))
      refuse("'", name, "' needs a ", std::is_integral_v<T> ? "whole number" : "number", " in ", low, "..", high, "; it has '", value, "'");
    return x;
  }

  void part(std::string_view part) {
    std::string_view name = part.substr(0, part.substr(0, 1) == "t" ? 1 : part.find_first_of("0123456789"));
    if (part == "mstdinf") name = "mstd";
    const std::string_view value = part.substr(name.size());
    if (!seen.insert(name).second) refuse("'", name, "' is there twice");
    if (name == "m")
      magnitude = static_cast<double>(number<int64_t>(name, value, 0, 100));
    else if (name == "mstd")
      policy.magnitude_std = deviation(value);
    else if (name == "mmax")
      policy.magnitude_max = static_cast<double>(number<int64_t>(name, value, 1, 100));
    else if (name == "n")
      policy.layers = number<int64_t>(name, value, 1, 16);
    else if (name == "p")
      policy.probability = number<double>(name, value, 0, 1);
    else if (name == "inc")
      increasing = number<int64_t>(name, value, 0, 1) == 1;
    else if (name == "t" && (value == "weights" || value == "3a" || value == "3aw"))
      list = value;
    else
      refuse("unknown part '", part, "'; parts are ", kParts, ", as in rand-m9-mstd0.5-inc1");
  }

  double deviation(std::string_view value) const {
    const double x = value == "inf" ? 1000 : number<double>("mstd", value, 0, 1000);
    return x > 100 ? std::numeric_limits<double>::infinity() : x;
  }

  AugmentPolicy finish() {
    policy.choices = list == "weights" ? weighted() : list == "3aw" ? weighted_3a() : increasing ? mesa::increasing() : standard();
    if (list == "3a") policy.choices = equally({Op::solarize_increasing, Op::desaturate, Op::gaussian_blur});
    policy.repeats = list.empty() || list == "3a";
    for (auto& choice : policy.choices) choice.magnitude = magnitude;
    policy.color_jitter = list.rfind("3a", 0) == 0;
    if (!policy.repeats && policy.layers > static_cast<int64_t>(policy.choices.size()))
      refuse("n", policy.layers, " asks for more operations than the ", policy.choices.size(), " of t", list, ", which picks none twice");
    return policy;
  }
};
}  // namespace

AugmentPolicy parse_augment(const std::string& text, const std::string& key) {
  if (text.empty()) return {};
  if (text == "3a") return three_augment();
  const std::string_view all = text;
  if (all.substr(0, 4) != "rand" || (all.size() > 4 && all[4] != '-'))
    throw Error(concat(key, ": must be empty, 3a or rand-..., such as rand-m9-mstd0.5-inc1; it is '", text, "'"));
  Reader reader{text, key, {}, 10, false, {}, {}};
  for (size_t from = 4; from < all.size();) {
    const size_t end = std::min(all.find('-', from + 1), all.size());
    reader.part(all.substr(from + 1, end - from - 1));
    from = end;
  }
  return reader.finish();
}

}  // namespace mesa
