// Pixel operations against Pillow's bytes, and the random choices of RandAugment, 3-Augment and random erasing.
#include "mesa/data/augment.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <map>
#include <numeric>
#include <set>
#include <sstream>

#include "mesa/data/transform.h"
#include "mesa/train/safetensors.h"
#include "support/data_files.h"
#include "support/paths.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Contains;

namespace {
constexpr Color kFill{124, 116, 104};

const SafetensorsFile& golden() {
  static const SafetensorsFile file = read_safetensors(source_dir() + "/tests/golden/augment.safetensors");
  return file;
}

const Tensor& of(const std::string& name) {
  const Tensor* tensor = golden().find(name);
  check(tensor != nullptr, "the golden file has no ", name);
  return *tensor;
}

const std::map<std::string, AugmentOp> kOps{{"AutoContrast", AugmentOp::auto_contrast},
                                            {"Equalize", AugmentOp::equalize},
                                            {"Invert", AugmentOp::invert},
                                            {"Rotate", AugmentOp::rotate},
                                            {"Posterize", AugmentOp::posterize},
                                            {"PosterizeIncreasing", AugmentOp::posterize_increasing},
                                            {"Solarize", AugmentOp::solarize},
                                            {"SolarizeIncreasing", AugmentOp::solarize_increasing},
                                            {"SolarizeAdd", AugmentOp::solarize_add},
                                            {"Color", AugmentOp::color},
                                            {"ColorIncreasing", AugmentOp::color_increasing},
                                            {"Contrast", AugmentOp::contrast},
                                            {"ContrastIncreasing", AugmentOp::contrast_increasing},
                                            {"Brightness", AugmentOp::brightness},
                                            {"BrightnessIncreasing", AugmentOp::brightness_increasing},
                                            {"Sharpness", AugmentOp::sharpness},
                                            {"SharpnessIncreasing", AugmentOp::sharpness_increasing},
                                            {"ShearX", AugmentOp::shear_x},
                                            {"ShearY", AugmentOp::shear_y},
                                            {"TranslateXRel", AugmentOp::translate_x},
                                            {"TranslateYRel", AugmentOp::translate_y},
                                            {"Desaturate", AugmentOp::desaturate},
                                            {"GaussianBlur", AugmentOp::gaussian_blur}};

Image picture(const std::string& name) {
  const Tensor& t = of("picture/" + name);
  return {static_cast<int>(t.dim(0)), static_cast<int>(t.dim(1)), static_cast<int>(t.dim(2)), t.to_vector<uint8_t>()};
}

Pixels view(Image& image) { return {image.pixels.data(), image.height, image.width, image.channels}; }

RandomStream stream(uint64_t seed, uint64_t index) { return RandomStream(RandomKey::of(seed, "augment_test", index)); }

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> words;
  std::istringstream in(text);
  for (std::string word; std::getline(in, word, '/');) words.push_back(word);
  return words;
}

Image rgb(int height, int width) { return {height, width, 3, Bytes(static_cast<size_t>(height) * width * 3, 200)}; }

/// A policy of one operation that always happens.
AugmentPolicy always(AugmentOp op, double magnitude) {
  AugmentPolicy policy;
  policy.choices = {{op, 1, magnitude}};
  policy.layers = 1;
  policy.probability = 1;
  return policy;
}

std::string parse_error(const std::string& text) {
  return error_of([&] { parse_augment(text, "data.augment"); });
}
}  // namespace

TEST_CASE("each operation gives Pillow's bytes", "[data][augment]") {
  std::map<std::string, int> compared;
  for (const NamedTensor& expected : golden().tensors) {
    const std::vector<std::string> name = split(expected.name);
    if (name[0] != "op") continue;
    INFO(expected.name);
    Image image = picture(name[1]);
    const bool bilinear = name.size() > 4 && name[4] == "bilinear";
    apply_augment_op(kOps.at(name[2]), std::stod(name[3]), bilinear ? Interpolation::bilinear : Interpolation::bicubic, kFill, view(image));
    CHECK(image.pixels == expected.tensor.to_vector<uint8_t>());
    ++compared[name[2]];
  }
  CHECK(compared.size() == 16);
  CHECK(std::accumulate(compared.begin(), compared.end(), 0, [](int n, auto& op) { return n + op.second; }) == 108);
}

TEST_CASE("a turned hue gives torchvision's bytes", "[data][augment]") {
  int compared = 0;
  for (const NamedTensor& expected : golden().tensors) {
    const std::vector<std::string> name = split(expected.name);
    if (name[0] != "hue") continue;
    INFO(expected.name);
    Image image = picture(name[1]);
    pixels::hue(view(image), std::stod(name[2]));
    CHECK(image.pixels == expected.tensor.to_vector<uint8_t>());
    ++compared;
  }
  CHECK(compared == 10);
}

TEST_CASE("operations stay inside the picture and what cannot be blurred is refused", "[data][augment]") {
  for (int64_t channels : {1, 3})
    for (const auto& size : {std::pair{1, 1}, {1, 5}, {4, 1}, {2, 2}}) {
      Bytes bytes(size.first * size.second * channels + 2, 90);  // a guard on each side
      bytes.front() = bytes.back() = 11;
      const Pixels p{bytes.data() + 1, size.first, size.second, channels};
      for (const auto& op : kOps)
        for (double argument : {0.0, 0.3, 2.0}) {
          apply_augment_op(op.second, argument, Interpolation::bicubic, kFill, p);
          apply_augment_op(op.second, argument, Interpolation::bilinear, kFill, p);
        }
      CHECK(int{bytes.front()} == 11);
      CHECK(int{bytes.back()} == 11);
    }
  Image image = rgb(4, 4);
  CHECK_THAT(error_of([&] { pixels::gaussian_blur(view(image), -1); }), Contains("it is -1"));
  CHECK_THAT(error_of([&] { pixels::gaussian_blur(view(image), NAN); }), Contains("blur"));
  CHECK_THAT(error_of([&] { pixels::gaussian_blur(view(image), 1e9); }), Contains("blur"));
  pixels::gaussian_blur(view(image), kLargestBlur);
  CHECK(image.pixels == rgb(4, 4).pixels);
}

TEST_CASE("posterize to no bits is black, and grayscale is convert(L)", "[data][augment]") {
  Image image = picture("rgb");
  pixels::posterize(view(image), -1);
  CHECK(image.pixels == Bytes(image.pixels.size(), 0));
  image = picture("rgb");
  pixels::grayscale(view(image));
  CHECK(image.pixels == of("op/rgb/Color/0.0").to_vector<uint8_t>());
  CHECK(image.pixels == convert_channels(convert_channels(picture("rgb"), 1), 3).pixels);
}

TEST_CASE("magnitudes become timm's arguments, with either sign where there is one", "[data][augment]") {
  const auto magnitudes = of("magnitudes").to_vector<double>();
  int compared = 0;
  for (const auto& op : kOps) {
    const Tensor* levels = golden().find("levels/" + op.first);
    if (levels == nullptr) continue;
    ++compared;
    INFO(op.first);
    const auto expected = levels->to_vector<double>();
    for (size_t i = 0; i < magnitudes.size(); ++i) {
      std::set<double> arguments;
      for (uint64_t draw = 0; draw < 40; ++draw) {
        RandomStream random = stream(1, draw);
        arguments.insert(augment_argument(op.second, magnitudes[i], random));
      }
      CHECK(arguments == std::set<double>{expected[i], expected[magnitudes.size() + i]});
    }
  }
  CHECK(compared == 20);
}

TEST_CASE("strings are read as timm reads them", "[data][augment]") {
  const auto parse = [](const char* text) { return parse_augment(text, "data.augment"); };
  CHECK(parse("").choices.empty());
  CHECK(parse("").color_jitter);
  const AugmentPolicy deit = parse("rand-m9-mstd0.5-inc1");
  REQUIRE(deit.choices.size() == 15);
  CHECK(deit.layers == 2);
  CHECK(deit.probability == 0.5);
  CHECK(deit.magnitude_std == 0.5);
  CHECK(deit.magnitude_max == 10);
  CHECK(deit.repeats);
  CHECK_FALSE(deit.color_jitter);
  for (const auto& choice : deit.choices) {
    CHECK(choice.magnitude == 9);
    CHECK(choice.weight == 1);
    for (AugmentOp decreasing :
         {AugmentOp::posterize, AugmentOp::solarize, AugmentOp::color, AugmentOp::contrast, AugmentOp::brightness, AugmentOp::sharpness})
      CHECK(choice.op != decreasing);
  }
  const AugmentPolicy plain = parse("rand");
  CHECK(plain.choices.size() == 15);
  CHECK(plain.choices[4].op == AugmentOp::posterize);
  CHECK(plain.choices[0].magnitude == 10);
  CHECK(plain.magnitude_std == 0);
  CHECK(parse("rand-inc0").choices[4].op == AugmentOp::posterize);
  const AugmentPolicy all = parse("rand-p0.25-n3-mmax30-m15-mstd101");
  CHECK(all.probability == 0.25);
  CHECK(all.layers == 3);
  CHECK(all.magnitude_max == 30);
  CHECK(all.choices[0].magnitude == 15);
  CHECK(std::isinf(all.magnitude_std));
  CHECK(std::isinf(parse("rand-mstdinf").magnitude_std));
  CHECK(parse("rand-mstd100").magnitude_std == 100);
  const AugmentPolicy weights = parse("rand-tweights");
  CHECK_FALSE(weights.repeats);
  CHECK(weights.choices.size() == 15);
  CHECK(weights.choices[0].weight == 3);
  CHECK(parse("rand-t3a").choices.size() == 3);
  CHECK(parse("rand-t3a").color_jitter);
  CHECK(parse("rand-t3aw-n14").choices.size() == 14);
  const AugmentPolicy three = parse("3a");
  CHECK(three.choices.size() == 3);
  CHECK(three.layers == 1);
  CHECK(three.probability == 1);
  CHECK(three.color_jitter);
}

TEST_CASE("strings with mistakes are refused with what is allowed", "[data][augment]") {
  CHECK_THAT(parse_error("augmix-m3"), Contains("data.augment") && Contains("rand-") && Contains("3a"));
  CHECK_THAT(parse_error("random"), Contains("'random'"));
  CHECK_THAT(parse_error("rand-x3"), Contains("unknown part 'x3'") && Contains("mstd"));
  CHECK_THAT(parse_error("rand-"), Contains("unknown part ''"));
  CHECK_THAT(parse_error("rand-m9-"), Contains("unknown part ''"));
  CHECK_THAT(parse_error("rand-w0"), Contains("unknown part 'w0'") && Contains("tweights"));
  CHECK_THAT(parse_error("rand-tfoo"), Contains("unknown part 'tfoo'"));
  CHECK_THAT(parse_error("rand-m"), Contains("'m' needs a whole number in 0..100"));
  CHECK_THAT(parse_error("rand-m9.5"), Contains("it has '9.5'"));
  CHECK_THAT(parse_error("rand-m101"), Contains("in 0..100"));
  CHECK_THAT(parse_error("rand-m99999999999999999999"), Contains("in 0..100"));
  CHECK_THAT(parse_error("rand-mmax0"), Contains("in 1..100"));
  CHECK_THAT(parse_error("rand-n0"), Contains("in 1..16"));
  CHECK_THAT(parse_error("rand-p1.5"), Contains("'p' needs a number in 0..1"));
  CHECK_THAT(parse_error("rand-mstd1e999"), Contains("'mstd' needs a number"));
  CHECK_THAT(parse_error("rand-inc2"), Contains("'inc' needs"));
  CHECK_THAT(parse_error("rand-m3-m4"), Contains("'m' is there twice"));
  CHECK_THAT(parse_error("rand-mstd1-mstdinf"), Contains("'mstd' is there twice"));
  CHECK_THAT(parse_error("rand-n15-t3aw"), Contains("n15 asks for more operations than the 14"));
  CHECK(parse_error("rand-n15-tweights") == "");
}

TEST_CASE("operations are picked and applied with their probabilities", "[data][augment]") {
  const uint64_t seed = 17;
  INFO("seed " << seed);
  // Solarize at 10 leaves bytes above 255 out of reach, invert mirrors them: 200 -> 200, 55; posterize at 2.5 keeps 1 bit: 128.
  AugmentPolicy policy;
  policy.choices = {{AugmentOp::invert, 1, 0}, {AugmentOp::posterize, 3, 2.5}};
  policy.layers = 1;
  policy.probability = 0.25;
  std::map<int, int> seen;
  const int rounds = 8000;
  for (int i = 0; i < rounds; ++i) {
    Image image = rgb(2, 2);
    RandomStream random = stream(seed, static_cast<uint64_t>(i));
    apply_augment(policy, {}, random, view(image));
    ++seen[image.pixels[0]];
  }
  CHECK(seen.size() == 3);
  const auto near = [&](int count, double share) {  // five standard deviations
    return std::fabs(count - rounds * share) < 5 * std::sqrt(rounds * share * (1 - share));
  };
  CHECK(near(seen[200], 0.75));
  CHECK(near(seen[55], 0.25 * 0.25));
  CHECK(near(seen[128], 0.25 * 0.75));
  // Without repetition both come, in the order in which they were picked: posterize of the inverse is 0, the inverse of 128 is 127.
  policy.layers = 2;
  policy.probability = 1;
  policy.repeats = false;
  seen.clear();
  for (int i = 0; i < rounds; ++i) {
    Image image = rgb(2, 2);
    RandomStream random = stream(seed + 1, static_cast<uint64_t>(i));
    apply_augment(policy, {}, random, view(image));
    ++seen[image.pixels[0]];
  }
  CHECK(seen.size() == 2);
  CHECK(near(seen[0], 0.25));
  CHECK(near(seen[127], 0.75));
}

TEST_CASE("magnitudes are fixed, normal or uniform, and clamped", "[data][augment]") {
  const uint64_t seed = 23;
  INFO("seed " << seed);
  // Solarize-add puts the magnitude into the picture: trunc(11 m) at most 110 for magnitudes up to 10.
  const auto magnitudes = [&](double deviation, double largest, double mean) {
    AugmentPolicy policy = always(AugmentOp::solarize_add, mean);
    policy.magnitude_std = deviation;
    policy.magnitude_max = largest;
    std::vector<double> out;
    for (uint64_t i = 0; i < 6000; ++i) {
      Image image{1, 1, 1, Bytes{0}};
      RandomStream random = stream(seed, i);
      apply_augment(policy, {}, random, view(image));
      out.push_back((image.pixels[0] + 0.5) / 11);  // the middle of what is truncated to it
    }
    return out;
  };
  const auto mean_of = [](const std::vector<double>& x) {
    return std::accumulate(x.begin(), x.end(), 0.0) / static_cast<double>(x.size());
  };
  const auto deviation_of = [&](const std::vector<double>& x) {
    double sum = 0;
    for (double v : x) sum += (v - mean_of(x)) * (v - mean_of(x));
    return std::sqrt(sum / static_cast<double>(x.size()));
  };
  CHECK(deviation_of(magnitudes(0, 10, 5)) < 1e-9);
  const auto normal = magnitudes(1, 10, 5);
  CHECK(mean_of(normal) == Approx(5).margin(0.06));
  CHECK(deviation_of(normal) == Approx(1).margin(0.05));
  const auto uniform = magnitudes(INFINITY, 10, 8);
  CHECK(mean_of(uniform) == Approx(4).margin(0.15));
  CHECK(deviation_of(uniform) == Approx(8 / std::sqrt(12)).margin(0.08));
  CHECK(*std::max_element(uniform.begin(), uniform.end()) < 8.1);
  const auto clamped = magnitudes(3, 10, 9);
  const auto at_top = std::count_if(clamped.begin(), clamped.end(), [](double m) { return m > 10; });
  CHECK(static_cast<double>(at_top) / 6000 == Approx(0.3694).margin(0.03));  // P(n > 1/3)
  const auto wide = magnitudes(3, 11.6, 9);
  CHECK(std::count_if(wide.begin(), wide.end(), [](double m) { return m > 11; }) > 100);
}

TEST_CASE("geometric operations draw the filter only where it is random", "[data][augment]") {
  const uint64_t seed = 29;
  INFO("seed " << seed);
  const AugmentPolicy policy = always(AugmentOp::rotate, 10);
  const auto results = [&](const AugmentSampling& sampling) {
    std::map<Bytes, int> seen;
    for (uint64_t i = 0; i < 400; ++i) {
      Image image = picture("rgb");
      RandomStream random = stream(seed, i);
      apply_augment(policy, sampling, random, view(image));
      ++seen[image.pixels];
    }
    return seen;
  };
  const auto cubic = results({Interpolation::bicubic, false, kFill}), linear = results({Interpolation::bilinear, false, kFill});
  CHECK(cubic.size() == 2);  // both signs
  CHECK(cubic.count(of("op/rgb/Rotate/-30.0/bicubic").to_vector<uint8_t>()) == 1);
  CHECK(linear.count(of("op/rgb/Rotate/-30.0/bilinear").to_vector<uint8_t>()) == 1);
  const auto either = results({Interpolation::bicubic, true, kFill});
  CHECK(either.size() == 4);
  for (const auto& result : either) {
    CHECK(cubic.count(result.first) + linear.count(result.first) == 1);
    CHECK(result.second > 50);
  }
}

TEST_CASE("3-Augment is one of grayscale, solarize and blur, equally likely", "[data][augment]") {
  const uint64_t seed = 31;
  INFO("seed " << seed);
  const AugmentPolicy policy = parse_augment("3a", "augment");
  const Bytes gray = of("op/rgb/Color/0.0").to_vector<uint8_t>(), solarized = of("op/rgb/Solarize/128").to_vector<uint8_t>();
  int grays = 0, solarizations = 0;
  std::set<Bytes> blurs;
  for (uint64_t i = 0; i < 900; ++i) {
    Image image = picture("rgb");
    RandomStream random = stream(seed, i);
    apply_augment(policy, {}, random, view(image));
    if (image.pixels == gray)
      ++grays;
    else if (image.pixels == solarized)
      ++solarizations;
    else
      blurs.insert(image.pixels);
  }
  CHECK(std::abs(grays - 300) < 71);  // five standard deviations
  CHECK(std::abs(solarizations - 300) < 71);
  CHECK(blurs.size() > 200);  // of many widths
}
