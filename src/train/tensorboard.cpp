#include "mesa/train/tensorboard.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>

namespace mesa {
namespace {

constexpr const char* kPrefix = "events.out.tfevents.";

// Protocol buffers: a field is its number and wire type, then a varint, 8 or 4 bytes, or a length and bytes.
enum WireType : uint32_t { kVarint = 0, kEightBytes = 1, kLengthAndBytes = 2, kFourBytes = 5 };

template <class T>
std::string little_endian(T value) {
  std::string out;
  for (size_t i = 0; i < sizeof value; ++i) out += static_cast<char>(value >> (8 * i) & 0xff);
  return out;
}

std::string varint(uint64_t value) {
  std::string out;
  for (; value >= 0x80; value >>= 7) out += static_cast<char>(value | 0x80);
  return out + static_cast<char>(value);
}

std::string key(uint32_t field, WireType type) { return varint(field << 3 | type); }
std::string whole(uint32_t field, int64_t x) { return key(field, kVarint) + varint(static_cast<uint64_t>(x)); }
std::string number(uint32_t field, double x) { return key(field, kEightBytes) + little_endian(std::bit_cast<uint64_t>(x)); }
std::string number(uint32_t field, float x) { return key(field, kFourBytes) + little_endian(std::bit_cast<uint32_t>(x)); }
std::string bytes(uint32_t field, const std::string& x) { return key(field, kLengthAndBytes) + varint(x.size()) + x; }
std::string packed(uint32_t field, const std::vector<double>& values) {
  std::string all;
  for (const double x : values) all += little_endian(std::bit_cast<uint64_t>(x));
  return bytes(field, all);
}

// Fields of the messages.
constexpr uint32_t kEventWallTime = 1, kEventStep = 2, kEventFileVersion = 3, kEventSummary = 5, kEventSessionLog = 7;
constexpr uint32_t kSummaryValue = 1, kValueTag = 1, kValueSimple = 2, kValueHistogram = 5, kSessionStatus = 1;
constexpr int64_t kSessionStart = 1;

std::string event(int64_t step, const std::string& what) {
  const double now = std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  return number(kEventWallTime, now) + whole(kEventStep, step) + what;
}

/// As tensorflow/core/lib/hash/crc32c.h: a sum of data that holds sums would be a weak one.
uint32_t masked_crc(std::string_view data) {
  const uint32_t crc = crc32c(data);
  return (crc >> 15 | crc << 17) + 0xa282ead8u;
}

std::string record(const std::string& data) {
  const std::string length = little_endian(static_cast<uint64_t>(data.size()));
  return length + little_endian(masked_crc(length)) + data + little_endian(masked_crc(data));
}

std::string name_of(int64_t seconds) {
  char text[80];
  std::snprintf(text, sizeof text, "%s%010lld.mesa.%d", kPrefix, static_cast<long long>(seconds), static_cast<int>(getpid()));
  return text;
}

/// The time now, but later than that of every event file of the folder: readers take them in the order of their names.
int64_t next_second(const std::string& folder) {
  int64_t next = std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(folder, ignored)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(kPrefix)) continue;
    const int64_t theirs = std::atoll(name.c_str() + std::char_traits<char>::length(kPrefix));
    if (theirs < 9'999'999'999) next = std::max(next, theirs + 1);
  }
  return next;
}

}  // namespace

uint32_t crc32c(std::string_view data) {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> out{};
    for (uint32_t i = 0; i < 256; ++i) {
      out[i] = i;
      for (int bit = 0; bit < 8; ++bit) out[i] = out[i] >> 1 ^ (out[i] & 1 ? 0x82f63b78u : 0u);
    }
    return out;
  }();
  uint32_t crc = ~0u;
  for (const char c : data) crc = crc >> 8 ^ table[(crc ^ static_cast<uint8_t>(c)) & 0xff];
  return ~crc;
}

Histogram histogram_of(const Tensor& x, int bins) {
  Histogram h;
  std::vector<double> values = to(x, kCpu).to_vector<double>();
  h.nonfinite = static_cast<int64_t>(std::erase_if(values, [](double v) { return !std::isfinite(v); }));
  h.count = static_cast<int64_t>(values.size());
  if (values.empty()) return h;
  const auto [low, high] = std::minmax_element(values.begin(), values.end());
  h.min = *low, h.max = *high;
  const double width = (h.max - h.min) / bins;
  if (!(width > 0) || !std::isfinite(width)) bins = 1;  // one value, or a range beyond doubles
  for (int i = 1; i <= bins; ++i) h.limits.push_back(i == bins ? h.max : h.min + width * i);
  h.counts.assign(static_cast<size_t>(bins), 0);
  for (const double v : values) {
    h.sum += v, h.sum_of_squares += v * v;
    const auto bin = bins == 1 ? size_t{0} : static_cast<size_t>((v - h.min) / width);
    ++h.counts[std::min(bin, h.counts.size() - 1)];
  }
  return h;
}

EventLog::EventLog(std::string folder, int64_t first_step) : folder_(std::move(folder)), first_step_(first_step) { open(); }

void EventLog::open() {
  path_ = folder_ + "/" + name_of(next_second(folder_));
  auto file = std::make_unique<OutputFile>(path_);
  file->write(record(event(0, bytes(kEventFileVersion, "brain.Event:2"))));
  file->write(record(event(first_step_, bytes(kEventSessionLog, whole(kSessionStatus, kSessionStart)))));
  file->flush();
  file_ = std::move(file);
}

void EventLog::write(int64_t step, const std::string& what) {
  if (!file_) open();
  try {
    file_->write(record(event(step, what)));
    file_->flush();
  } catch (const Error&) {
    file_.reset();
    throw;
  }
  first_step_ = std::max(first_step_, step);  // of a file that has to begin after a failure
}

void EventLog::scalars(int64_t step, Scalars values) {
  std::string summary;
  for (const auto& [tag, value] : values)
    if (!std::isnan(value)) summary += bytes(kSummaryValue, bytes(kValueTag, tag) + number(kValueSimple, static_cast<float>(value)));
  if (!summary.empty()) write(step, bytes(kEventSummary, summary));
}

void EventLog::histogram(int64_t step, const std::string& tag, const Histogram& h) {
  if (h.count == 0) return;
  const std::string histogram = number(1, h.min) + number(2, h.max) + number(3, static_cast<double>(h.count)) + number(4, h.sum) +
                                number(5, h.sum_of_squares) + packed(6, h.limits) + packed(7, h.counts);
  write(step, bytes(kEventSummary, bytes(kSummaryValue, bytes(kValueTag, tag) + bytes(kValueHistogram, histogram))));
}

}  // namespace mesa
