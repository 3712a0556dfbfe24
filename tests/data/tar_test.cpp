// Tar archives: every kind of header that writers use, and every way an archive can be wrong.
#include "mesa/data/tar.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstring>

#include "support/tar_files.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Contains;

namespace {
ReadAt reader(const Bytes& bytes) {
  return [&](uint64_t offset, uint8_t* to, size_t count) {
    check(offset <= bytes.size() && count <= bytes.size() - offset, "read outside the archive: ", offset, " + ", count);
    std::copy_n(bytes.data() + offset, count, to);
  };
}

std::vector<TarFile> list(const Bytes& bytes) { return list_tar(reader(bytes), bytes.size(), "shard.tar"); }
std::vector<ShardSample> index(const Bytes& bytes) { return index_shard(reader(bytes), bytes.size(), "shard.tar"); }
std::string list_error(const Bytes& bytes) {
  return error_of([&] { list(bytes); });
}
std::string index_error(const NamedFiles& files) {
  const Bytes bytes = tar_bytes(files);
  return error_of([&] { index(bytes); });
}
std::string pax(const std::string& key, const std::string& value) {
  const std::string record = " " + key + "=" + value + "\n";
  size_t length = record.size() + 1;
  while (std::to_string(length).size() + record.size() != length) ++length;
  return std::to_string(length) + record;
}
const std::string kLong = std::string(150, 'd') + "/" + std::string(120, 'f') + ".jpg";
}  // namespace

TEST_CASE("tar: plain files with their places, folders and global headers passed over", "[data][tar]") {
  const Bytes bytes = joined({tar_entry("pax_global_header", text_bytes(pax("comment", "x")), 'g'), tar_entry("a/", {}, '5'),
                              tar_entry("a/one", Bytes(513, 1)), tar_entry("empty", {}), tar_entry("old", Bytes(3, 2), '\0'), tar_end()});
  const auto files = list(bytes);
  REQUIRE(files.size() == 3);
  CHECK(files[0].name == "a/one");
  CHECK(files[0].size == 513);
  CHECK(files[1].size == 0);
  CHECK(files[2].name == "old");
  CHECK(int{bytes[files[2].offset]} == 2);
  CHECK(list(joined({tar_entry("x", {}), tar_end(), Bytes(9 * 512, 0)})).size() == 1);  // tar pads to 10,240 bytes
}

TEST_CASE("tar: long names by prefix, by GNU and by pax, and large sizes in binary and by pax", "[data][tar]") {
  Bytes prefixed = tar_entry("0001.jpg", Bytes(5, 1));
  std::memcpy(&prefixed[345], "some/folder", 11);
  fix_checksum(prefixed, 0);
  CHECK(list(joined({prefixed, tar_end()})).at(0).name == "some/folder/0001.jpg");
  const Bytes gnu =
      joined({tar_entry("././@LongLink", text_bytes(kLong + '\0'), 'L'), tar_entry("cut", Bytes(5, 1)), tar_entry("next", {}), tar_end()});
  CHECK(list(gnu).at(0).name == kLong);
  CHECK(list(gnu).at(1).name == "next");
  const Bytes posix = joined({tar_entry("PaxHeaders/x", text_bytes(pax("mtime", "1.5") + pax("path", kLong)), 'x'),
                              tar_entry("cut", Bytes(5, 1)), tar_entry("next", {}), tar_end()});
  CHECK(list(posix).at(0).name == kLong);
  CHECK(list(posix).at(1).name == "next");
  const Bytes sized =
      joined({tar_entry("h", text_bytes(pax("size", "5")), 'x'), tar_entry_of_size("x", Bytes(5, 1), "00000000000"), tar_end()});
  CHECK(list(sized).at(0).size == 5);
  Bytes binary = tar_entry_of_size("x", Bytes(5, 1), std::string("\x80\0\0\0\0\0\0\0\0\0\0\x05", 12));
  CHECK(list(joined({binary, tar_end()})).at(0).size == 5);
}

TEST_CASE("tar: a cut at any place is refused", "[data][tar]") {
  const Bytes whole = tar_bytes({{"a.jpg", Bytes(700, 1)}, {"a.cls", text_bytes("3")}});
  const size_t content = whole.size() - 1024;  // the archive ends with its first block of zeros
  for (size_t length = 0; length < content + 512; length += length % 64 == 0 ? 7 : 1) {
    INFO(length);
    CHECK_THAT(list_error(Bytes(whole.begin(), whole.begin() + static_cast<int64_t>(length))), Contains("shard.tar: is "));
  }
  CHECK(list_error(whole) == "");
}

TEST_CASE("tar: damaged headers are refused, whichever bit it is", "[data][tar]") {
  const Bytes whole = tar_bytes({{"a.jpg", Bytes(7, 1)}});
  for (size_t bit = 0; bit < 512 * 8; ++bit) {
    Bytes damaged = whole;
    damaged[bit / 8] = static_cast<uint8_t>(damaged[bit / 8] ^ 1 << bit % 8);
    const bool in_checksum = bit / 8 >= 148 && bit / 8 < 156;  // where a 0 may become a blank, which says the same
    if (list_error(damaged).empty() && !(in_checksum && list(damaged).at(0).size == 7)) FAIL("bit " << bit << " is not missed");
  }
}

TEST_CASE("tar: hostile headers are refused by name", "[data][tar]") {
  const auto one = [](const Bytes& entry) { return list_error(joined({entry, tar_end()})); };
  CHECK_THAT(list_error({}), Contains("shard.tar: is empty"));
  CHECK_THAT(list_error(gzip(tar_bytes({{"a", {}}}))), Contains("gzip") && Contains("unpack it"));
  CHECK_THAT(list_error(Bytes(2000, 'x')), Contains("not a tar archive"));
  CHECK_THAT(one(tar_entry_of_size("x", {}, "77777777777")), Contains("truncated") && Contains("8589934591"));
  CHECK_THAT(one(tar_entry_of_size("x", {}, std::string("\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", 12))),
             Contains("no readable size"));
  CHECK_THAT(one(tar_entry_of_size("x", {}, std::string("\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff", 12))), Contains("truncated"));
  CHECK_THAT(one(tar_entry_of_size("x", {}, "12x4")), Contains("no readable size"));
  CHECK_THAT(one(tar_entry("", {})), Contains("no name"));
  for (const char type : {'1', '2', '3', '6', 'S', 'V'}) CHECK_THAT(one(tar_entry("link.jpg", {}, type)), Contains("link.jpg is a link"));
  CHECK_THAT(one(tar_entry("L", text_bytes(kLong), 'L')), Contains("before nothing"));
  CHECK_THAT(one(tar_entry("L", Bytes((1 << 20) + 1, 'x'), 'L')), Contains("claims a name"));
  for (const std::string broken : {"12 path", "0 path=x\n", "999 path=x\n", "x path=x\n", "6 path\n", "99999999999999999999 a=b\n", "5\n"})
    CHECK_THAT(one(tar_entry("x", text_bytes(broken), 'x')), Contains("pax header at 0 is damaged"));
  CHECK_THAT(one(tar_entry("x", text_bytes(pax("size", "-1")), 'x')), Contains("unreadable size"));
  CHECK_THAT(one(tar_entry("x", text_bytes(pax("GNU.sparse.major", "1")), 'x')), Contains("sparse"));
  const Bytes two = joined({tar_bytes({{"a", {}}}), tar_bytes({{"b", {}}})});
  CHECK_THAT(list_error(two), Contains("behind the archive's end"));
}

TEST_CASE("tar: samples are pictures with labels, in the order of the pictures", "[data][tar]") {
  const Bytes picture(9, 7);
  const auto samples = index(tar_bytes({{"b.cls", text_bytes(" 12\n")},
                                        {"d/c.seg.PNG", picture},  // the key ends at the first dot, so this is another kind of file
                                        {"b.json", text_bytes("{}")},
                                        {"._b.jpg", picture},
                                        {"d/a.JPEG", picture},
                                        {"b.jpg", picture},
                                        {"d/a.cls", text_bytes("0")},
                                        {"c.png", picture},
                                        {"notes", picture},
                                        {"c.cls", text_bytes("999999")}}));
  REQUIRE(samples.size() == 3);
  CHECK(samples[0].name == "d/a.JPEG");
  CHECK(samples[0].label == 0);
  CHECK(samples[1].name == "b.jpg");
  CHECK(samples[1].label == 12);
  CHECK(samples[2].label == 999999);
  CHECK(samples[2].size == 9);
}

TEST_CASE("tar: missing, doubled and impossible parts of samples are named", "[data][tar]") {
  const Bytes picture(9, 7);
  const auto label = [](const std::string& text) { return NamedFiles{{"a.jpg", Bytes(9)}, {"a.cls", text_bytes(text)}}; };
  CHECK(index_error(label("5")) == "");
  CHECK_THAT(index_error({{"a.txt", picture}}), Contains("holds no .jpg"));
  CHECK_THAT(index_error({{"a.jpg", picture}, {"b.jpg", picture}, {"a.cls", text_bytes("1")}}),
             Contains("b.jpg has no label") && Contains("b.cls"));
  CHECK_THAT(index_error({{"a.jpg", picture}, {"a.cls", text_bytes("1")}, {"c.cls", text_bytes("1")}}), Contains("c.cls has no picture"));
  CHECK_THAT(index_error({{"a.jpg", picture}, {"a.png", picture}, {"a.cls", text_bytes("1")}}), Contains("a.png is the second picture"));
  CHECK_THAT(index_error({{"a.jpg", picture}, {"a.cls", text_bytes("1")}, {"a.cls", text_bytes("1")}}), Contains("a.cls comes twice"));
  const std::vector<std::string> labels{"", " ", "x", "1x", "1 2", "0x1", "1.0", "99999999999999999999", std::string(40, ' ')};
  for (const std::string& text : labels) CHECK_THAT(index_error(label(text)), Contains("a.cls does not hold a label"));
  for (const std::string text : {"-1", "1000000"}) CHECK_THAT(index_error(label(text)), Contains("labels go from 0 to 999999"));
}
