#include "mesa/train/pictures.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "mesa/base/files.h"
#include "mesa/data/pixels.h"
#include "mesa/data/resize.h"
#include "mesa/train/files.h"

namespace mesa {
namespace {

using nlohmann::ordered_json;

constexpr char kDigits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
constexpr int64_t kMostBytes = 8 << 20;  // of a file: 32 pictures of 80 x 80 take 0.8 MB at worst

Image small_picture(const Batch& batch, int64_t at) {
  const Tensor& images = batch.images;
  Image image{static_cast<int>(images.dim(1)), static_cast<int>(images.dim(2)), static_cast<int>(images.dim(3)), {}};
  const int64_t bytes = images.numel() / images.dim(0);
  const uint8_t* from = images.data<uint8_t>() + at * bytes;
  image.pixels.assign(from, from + bytes);
  if (batch.mirrored.defined() && batch.mirrored.data<uint8_t>()[at] != 0)
    pixels::mirror({image.pixels.data(), image.height, image.width, image.channels});
  const int longest = std::max(image.height, image.width);
  if (longest <= kPictureSide) return image;
  const auto reduced = [&](int side) { return std::max(1, side * kPictureSide / longest); };
  Image out{reduced(image.height), reduced(image.width), image.channels, {}};
  out.pixels.resize(static_cast<size_t>(out.height) * out.width * out.channels);
  resize(image, {0, 0, image.height, image.width}, out.height, out.width, {0, 0, out.height, out.width}, Interpolation::bilinear,
         out.pixels.data());
  return out;
}

std::string name_of(int64_t label, const std::vector<std::string>& names) {
  return label >= 0 && label < static_cast<int64_t>(names.size()) ? names[static_cast<size_t>(label)] : std::to_string(label);
}

LabelledPicture labelled(const Batch& batch, int64_t at, const std::vector<std::string>& names) {
  LabelledPicture out;
  out.index = batch.sample_indices.at(static_cast<size_t>(at));
  out.label = batch.labels.data<int64_t>()[at];
  out.name = name_of(out.label, names);
  out.png = to_png(small_picture(batch, at));
  return out;
}

template <class T>
T field(const ordered_json& object, const char* key) {
  check(object.is_object() && object.contains(key), "'", key, "' is missing");
  try {
    return object.at(key).get<T>();
  } catch (const nlohmann::json::exception&) {
    fail("'", key, "' is of another kind");
  }
}

LabelledPicture parse_picture(const ordered_json& json, bool predictions) {
  LabelledPicture p;
  p.index = field<int64_t>(json, "index"), p.label = field<int64_t>(json, "label"), p.name = field<std::string>(json, "name");
  if (predictions) {
    p.predicted = field<int64_t>(json, "predicted"), p.predicted_name = field<std::string>(json, "predicted_name");
    p.confidence = field<double>(json, "confidence");
  }
  p.png = from_base64(field<std::string>(json, "png"));
  const Image image = decode_image(p.png.data(), p.png.size(), "a picture", {kPictureSide * kPictureSide});
  check(image.height <= kPictureSide && image.width <= kPictureSide, "a picture has ", image.height, " x ", image.width, " pixels");
  return p;
}

}  // namespace

PictureList sample_pictures(const Batch& batch, const std::vector<std::string>& class_names) {
  PictureList list;
  list.epoch = batch.epoch + 1;
  const int64_t count = std::min<int64_t>(batch.images.dim(0), kMostPictures);
  for (int64_t i = 0; i < count; ++i) list.pictures.push_back(labelled(batch, i, class_names));
  return list;
}

void MistakeFinder::take(const Batch& batch, const Tensor& logits) {
  const int64_t classes = logits.dim(1);
  for (int64_t b = 0; b < logits.dim(0) && list_.pictures.size() < kMostPictures; ++b) {
    const float* row = logits.data<float>() + b * classes;
    if (std::any_of(row, row + classes, [](float x) { return std::isnan(x); })) continue;
    const int64_t best = std::max_element(row, row + classes) - row;  // the first of equals, as count_top decides
    if (best == batch.labels.data<int64_t>()[b]) continue;
    double sum = 0;  // softmax at its largest logit
    for (int64_t c = 0; c < classes; ++c) sum += row[c] == row[best] ? 1 : std::exp(static_cast<double>(row[c]) - row[best]);
    LabelledPicture p = labelled(batch, b, class_names_);
    p.predicted = best;
    p.predicted_name = name_of(best, class_names_);
    p.confidence = 1 / sum;
    list_.pictures.push_back(std::move(p));
  }
}

PictureList MistakeFinder::finish(int64_t epoch, int64_t step) {
  PictureList out = std::move(list_);
  out.epoch = epoch, out.step = step;
  list_ = {};
  list_.predictions = true;
  return out;
}

void write_pictures(const std::string& path, const PictureList& list) {
  ordered_json pictures = ordered_json::array();
  for (const LabelledPicture& p : list.pictures) {
    ordered_json one = {{"index", p.index}, {"label", p.label}, {"name", p.name}};
    if (list.predictions) {
      one["predicted"] = p.predicted;
      one["predicted_name"] = p.predicted_name;
      one["confidence"] = p.confidence;
    }
    one["png"] = to_base64(p.png);
    pictures.push_back(std::move(one));
  }
  const ordered_json json = {{"epoch", list.epoch}, {"step", list.step}, {"predictions", list.predictions}, {"pictures", pictures}};
  write_file_atomically(path, json.dump(1, ' ', false, ordered_json::error_handler_t::replace) + "\n");
}

PictureList read_pictures(const std::string& path) try {
  const ordered_json json = ordered_json::parse(read_text(path, kMostBytes), nullptr, false);
  PictureList list;
  list.epoch = field<int64_t>(json, "epoch"), list.step = field<int64_t>(json, "step");
  list.predictions = field<bool>(json, "predictions");
  const auto pictures = field<ordered_json>(json, "pictures");
  check(pictures.is_array() && pictures.size() <= kMostPictures, "'pictures' is no list of at most ", kMostPictures);
  for (const auto& one : pictures) list.pictures.push_back(parse_picture(one, list.predictions));
  return list;
} catch (const Error& e) {
  const std::string what = e.what();
  throw Error(what.find(path) == std::string::npos ? path + ": " + what : what);
}

std::string to_base64(const std::vector<uint8_t>& bytes) {
  std::string out;
  out.reserve((bytes.size() + 2) / 3 * 4);
  for (size_t i = 0; i < bytes.size(); i += 3) {
    const size_t n = std::min<size_t>(3, bytes.size() - i);
    const uint32_t bits = bytes[i] << 16 | (n > 1 ? bytes[i + 1] << 8 : 0) | (n > 2 ? bytes[i + 2] : 0);
    for (size_t k = 0; k < 4; ++k) out += k <= n ? kDigits[bits >> (18 - 6 * k) & 63] : '=';
  }
  return out;
}

std::vector<uint8_t> from_base64(const std::string& text) {
  check(text.size() % 4 == 0, "base64 of ", text.size(), " characters is not whole");
  size_t padding = 0;
  while (padding < 2 && padding < text.size() && text[text.size() - 1 - padding] == '=') ++padding;
  std::vector<uint8_t> out;
  out.reserve(text.size() / 4 * 3);
  uint32_t bits = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const char* digit = std::find(kDigits, kDigits + 64, text[i]);
    check(digit != kDigits + 64 || i >= text.size() - padding, "base64 has an odd character at place ", i);
    bits = bits << 6 | (digit == kDigits + 64 ? 0 : static_cast<uint32_t>(digit - kDigits));
    if (i % 4 != 3) continue;
    for (const int shift : {16, 8, 0}) out.push_back(static_cast<uint8_t>(bits >> shift));
    bits = 0;
  }
  out.resize(out.size() - padding);
  return out;
}

}  // namespace mesa
