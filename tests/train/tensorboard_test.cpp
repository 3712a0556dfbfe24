// Event files, read back by a reader that shares nothing with the writer.
#include "mesa/train/tensorboard.h"

#include <algorithm>
#include <bit>
#include <catch2/catch.hpp>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>

#include "mesa/base/files.h"
#include "support/data_files.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

/// CRC-32C bit by bit: division of polynomials, no table.
uint32_t slow_crc32c(const std::string& bytes) {
  uint32_t crc = 0xffffffff;
  for (const unsigned char byte : bytes) {
    crc ^= byte;
    for (int i = 0; i < 8; ++i) crc = (crc & 1) != 0 ? (crc >> 1) ^ 0x82f63b78 : crc >> 1;
  }
  return ~crc;
}

template <class T>
T take(const std::string& text, size_t& at) {
  REQUIRE(at + sizeof(T) <= text.size());
  T out;
  std::memcpy(&out, text.data() + at, sizeof out);
  at += sizeof out;
  return out;
}

/// One field of a message: its bytes for wire type 2, its bits for the others.
struct Field {
  uint64_t number, bits;
  std::string bytes;
  double as_double() const { return std::bit_cast<double>(bits); }
  float as_float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits)); }
};

std::vector<Field> fields_of(const std::string& message) {
  std::vector<Field> out;
  size_t at = 0;
  const auto varint = [&] {
    uint64_t value = 0;
    for (int shift = 0;; shift += 7) {
      REQUIRE(at < message.size());
      const auto byte = static_cast<unsigned char>(message[at++]);
      value |= uint64_t{byte & 0x7fu} << shift;
      if (byte < 128) return value;
    }
  };
  while (at < message.size()) {
    const uint64_t key = varint();
    Field f{key >> 3, 0, ""};
    switch (key & 7) {
      case 0: f.bits = varint(); break;
      case 1: f.bits = take<uint64_t>(message, at); break;
      case 5: f.bits = take<uint32_t>(message, at); break;
      case 2: {
        const uint64_t size = varint();
        REQUIRE(size <= message.size() - at);
        f.bytes = message.substr(at, size);
        at += size;
        break;
      }
      default: FAIL("wire type " << (key & 7));
    }
    out.push_back(f);
  }
  return out;
}

const Field* find(const std::vector<Field>& fields, uint64_t number) {
  const auto found = std::find_if(fields.begin(), fields.end(), [&](const Field& f) { return f.number == number; });
  return found == fields.end() ? nullptr : &*found;
}

struct Event {
  int64_t step = 0;
  double wall_time = 0;
  std::string version;
  bool start = false;
  std::map<std::string, float> scalars;
  std::map<std::string, std::vector<Field>> histograms;
};

Event parse(const std::string& data) {
  Event e;
  for (const Field& f : fields_of(data)) {
    if (f.number == 1) e.wall_time = f.as_double();
    if (f.number == 2) e.step = static_cast<int64_t>(f.bits);
    if (f.number == 3) e.version = f.bytes;
    if (f.number == 7) e.start = find(fields_of(f.bytes), 1)->bits == 1;
    if (f.number != 5) continue;
    for (const Field& value : fields_of(f.bytes)) {
      CHECK(value.number == 1);
      const auto parts = fields_of(value.bytes);
      const std::string tag = find(parts, 1)->bytes;
      if (const Field* scalar = find(parts, 2)) e.scalars[tag] = scalar->as_float();
      if (const Field* histogram = find(parts, 5)) e.histograms[tag] = fields_of(histogram->bytes);
    }
  }
  return e;
}

std::vector<Event> read_events(const std::string& path) {
  const std::string text = read_text(path);
  const auto unmask = [](uint32_t masked) {
    const uint32_t rotated = masked - 0xa282ead8;
    return rotated >> 17 | rotated << 15;
  };
  std::vector<Event> events;
  for (size_t at = 0; at < text.size();) {
    const std::string length_bytes = text.substr(at, 8);
    const auto length = take<uint64_t>(text, at);
    CHECK(unmask(take<uint32_t>(text, at)) == slow_crc32c(length_bytes));
    const std::string data = text.substr(at, length);
    REQUIRE(data.size() == length);
    at += length;
    CHECK(unmask(take<uint32_t>(text, at)) == slow_crc32c(data));
    events.push_back(parse(data));
  }
  return events;
}

std::vector<double> doubles(const Field& packed) {
  std::vector<double> out(packed.bytes.size() / 8);
  std::memcpy(out.data(), packed.bytes.data(), packed.bytes.size());
  return out;
}

}  // namespace

TEST_CASE("tensorboard: CRC-32C has the published values") {
  CHECK(crc32c("123456789") == 0xe3069283);            // the check value of CRC-32C/iSCSI
  CHECK(crc32c(std::string(32, '\0')) == 0x8a9136aa);  // RFC 3720, B.4
  CHECK(crc32c(std::string(32, '\xff')) == 0x62a8ab43);
  CHECK(slow_crc32c("123456789") == 0xe3069283);
}

TEST_CASE("tensorboard: what is written is read back") {
  const TemporaryFolder folder;
  EventLog log(folder.path().string(), 0);
  const std::pair<std::string, double> values[] = {{"train/loss", 2.5}, {"train/lr", 1e-3}, {"odd", std::nan("")}, {"big", 1e300}};
  log.scalars(300, values);
  const std::pair<std::string, double> none[] = {{"odd", std::nan("")}};
  log.scalars(301, none);
  const Histogram h = histogram_of(Tensor::from<float>({2, 3}, {-1, 0, 1, 3, 3, std::numeric_limits<float>::infinity()}), 4);
  log.histogram(5'000'000'000, "weight/w", h);
  const auto events = read_events(log.path());
  REQUIRE(events.size() == 4);
  CHECK(events[0].version == "brain.Event:2");
  CHECK(events[1].start);
  CHECK(events[1].step == 0);
  CHECK(events[2].step == 300);
  CHECK(events[2].wall_time > 1.6e9);
  CHECK(events[2].scalars ==
        std::map<std::string, float>{{"train/loss", 2.5f}, {"train/lr", 1e-3f}, {"big", std::numeric_limits<float>::infinity()}});
  CHECK(events[3].step == 5'000'000'000);
  const auto& fields = events[3].histograms.at("weight/w");
  const double expected[] = {-1, 3, 5, 6, 20};  // min, max, num, sum, sum of squares
  for (int i = 0; i < 5; ++i) CHECK(find(fields, i + 1)->as_double() == expected[i]);
  CHECK(doubles(*find(fields, 6)) == std::vector<double>{0, 1, 2, 3});
  CHECK(doubles(*find(fields, 7)) == std::vector<double>{1, 1, 1, 2});
  CHECK(h.nonfinite == 1);
}

TEST_CASE("tensorboard: histograms of one value, of none, and of the widest range") {
  const Histogram one = histogram_of(Tensor::from<float>({2}, {7, 7}));
  CHECK(one.limits == std::vector<double>{7});
  CHECK(one.counts == std::vector<double>{2});
  CHECK(histogram_of(Tensor::from<float>({1}, {std::nanf("")})).count == 0);
  const double most = std::numeric_limits<double>::max();
  const Histogram wide = histogram_of(Tensor::from<double>({3}, {-most, 0, most}));
  CHECK(wide.count == 3);
  CHECK(wide.limits == std::vector<double>{most});
}

TEST_CASE("tensorboard: a later start writes a file of its own that voids what it repeats") {
  const TemporaryFolder folder;
  const EventLog first(folder.path().string(), 0), second(folder.path().string(), 41), third(folder.path().string(), 21);
  CHECK(first.path() < second.path());
  CHECK(second.path() < third.path());
  CHECK(read_events(second.path()).at(1).step == 41);
  CHECK(read_events(second.path()).at(1).start);
  CHECK(read_events(third.path()).at(1).step == 21);
}

TEST_CASE("tensorboard: after a full disk events go on in a whole file") {
  const TemporaryFolder folder;
  EventLog log(folder.path().string(), 0);
  const std::string before = log.path();
  const std::pair<std::string, double> values[] = {{"loss", 1.0}};
  log.scalars(10, values);
  set_file_fault([](std::string_view operation, const std::string&) { return operation == "write" ? ENOSPC : 0; });
  CHECK_THROWS_WITH(log.scalars(20, values), Contains("No space left"));
  CHECK_THROWS_WITH(log.scalars(30, values), Contains("No space left"));
  set_file_fault({});
  log.scalars(40, values);
  CHECK(log.path() > before);
  CHECK(read_events(before).back().step == 10);
  const auto events = read_events(log.path());
  REQUIRE(events.size() == 3);
  CHECK(events[1].step == 10);
  CHECK(events[2].step == 40);
}
