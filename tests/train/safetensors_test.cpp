#include "mesa/train/safetensors.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <filesystem>

#include "mesa/base/files.h"
#include "mesa/train/files.h"

using namespace mesa;
using Catch::Matchers::Contains;

namespace {

std::string file_of(const std::string& header, const std::string& data, uint64_t claimed = 0) {
  const uint64_t length = claimed ? claimed : header.size();
  std::string out(reinterpret_cast<const char*>(&length), 8);
  return out + header + data;
}

std::string error_of(const std::string& bytes) {
  try {
    parse_safetensors(bytes, "w.safetensors");
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return "\"" + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}";
}

std::vector<NamedTensor> sample() {
  std::vector<NamedTensor> out;
  out.push_back({"b.weight", Tensor::from<float>({2, 3}, {1, -2, NAN, INFINITY, 0, 6})});
  out.push_back({"a.bias", Tensor::from<float>({2}, {7, 8})});
  out.push_back({"scalar", Tensor::from<double>({}, {3.5})});
  out.push_back({"empty", Tensor::from<float>({0, 4}, {})});
  out.push_back({"codes", Tensor::from<uint8_t>({3}, {1, 2, 255})});
  out.push_back({"steps", Tensor::from<int64_t>({1}, {-5})});
  out.push_back({"labels", Tensor::from<int32_t>({2}, {-1, 2})});
  out.push_back({"half", Tensor::from<bf16>({2}, {bf16(1.5f), bf16(-2.0f)})});
  return out;
}

}  // namespace

TEST_CASE("safetensors: what is written reads back bit for bit") {
  const auto tensors = sample();
  const std::map<std::string, std::string> metadata{{"format", "pt"}, {"model", "vit \"x\" \xc3\xa9"}};
  const std::string bytes = format_safetensors(tensors, metadata);
  const SafetensorsFile file = parse_safetensors(bytes, "w");
  CHECK(file.metadata == metadata);
  REQUIRE(file.tensors.size() == tensors.size());
  for (const NamedTensor& t : tensors) {
    INFO(t.name);
    const Tensor* found = file.find(t.name);
    REQUIRE(found != nullptr);
    CHECK(found->dtype() == t.tensor.dtype());
    CHECK(found->shape() == t.tensor.shape());
    if (t.tensor.bytes() > 0) CHECK(std::memcmp(found->raw(), t.tensor.raw(), t.tensor.bytes()) == 0);
  }
  CHECK(file.find("none") == nullptr);

  uint64_t header = 0;
  std::memcpy(&header, bytes.data(), 8);
  CHECK(header % 8 == 0);
  CHECK(file.tensors.front().name == "scalar");  // 8-byte elements come first
  CHECK(file.tensors.back().name == "codes");
  auto reversed = tensors;
  std::reverse(reversed.begin(), reversed.end());
  CHECK(format_safetensors(reversed, metadata) == bytes);

  const std::string path = std::filesystem::temp_directory_path() / "mesa-safetensors-test";
  write_safetensors(path, tensors, metadata);
  CHECK(read_text(path) == bytes);
  const SafetensorsFile again = read_safetensors(path);
  CHECK(format_safetensors(again.tensors, again.metadata) == bytes);
  std::filesystem::resize_file(path, bytes.size() - 1);
  CHECK_THROWS_WITH(read_safetensors(path), Contains(path) && Contains("is truncated"));
  std::filesystem::remove(path);
  CHECK_THROWS_WITH(read_safetensors(path), Contains("No such file"));
  CHECK_THROWS_WITH(read_safetensors("/tmp"), Contains("is not a file"));
}

TEST_CASE("safetensors: no tensors, zero sizes and padded headers are legal") {
  CHECK(parse_safetensors(format_safetensors({}), "w").tensors.empty());
  CHECK(parse_safetensors(file_of("{}      ", ""), "w").tensors.empty());
  const SafetensorsFile zero =
      parse_safetensors(file_of("{" + entry("a", "F32", "[2,0]", "[0,0]") + "," + entry("b", "U8", "[1]", "[0,1]") + "}", "x"), "w");
  CHECK(zero.find("a")->shape() == Shape{2, 0});
  CHECK(zero.find("b")->numel() == 1);
}

TEST_CASE("safetensors: what cannot be written is refused") {
  const Tensor x = Tensor::from<float>({2, 3}, {1, 2, 3, 4, 5, 6});
  const auto refused = [](std::vector<NamedTensor> tensors, std::map<std::string, std::string> metadata, const char* why) {
    CHECK_THROWS_WITH(format_safetensors(tensors, metadata), Contains(why));
  };
  refused({{"a", x}, {"a", x}}, {}, "two tensors are called 'a'");
  refused({{"a", x.transpose(0, 1)}}, {}, "'a' is not contiguous");
  refused({{"__metadata__", x}}, {}, "__metadata__");
  refused({{"a", Tensor()}}, {}, "'a' is not in host memory");
  refused({{"\xff", x}}, {}, "not UTF-8");
  refused({}, {{"k", "\xff"}}, "not UTF-8");
  CHECK_THROWS_WITH(write_safetensors("/dev/full", std::vector<NamedTensor>{{"a", x}}), Contains("/dev/full: No space left"));
  CHECK_THROWS_WITH(write_safetensors("/nonexistent/x", std::vector<NamedTensor>{{"a", x}}), Contains("No such file"));
}

TEST_CASE("safetensors: malformed files are refused") {
  struct Row {
    std::string bytes;
    const char* message;
  };
  const std::string f = entry("t", "F32", "[1]", "[0,4]"), four = "abcd";
  const Row rows[] = {
      {"", "is too short"},
      {"1234567", "is too short"},
      {file_of("{}", "", 100'000'001), "claims a header of 100000001 bytes"},
      {file_of("{}", "", UINT64_MAX), "claims a header of"},
      {file_of("{}", "", 3), "is truncated: the header needs 3 bytes, but 2 follow"},
      {std::string(8, '\0'), "does not begin with '{'"},
      {file_of("{\"\xff\xfe\":1}", ""), "not valid JSON"},
      {file_of("{\"a\"", ""), "not valid JSON"},
      {file_of("{} x", ""), "not valid JSON"},
      {file_of(std::string("{}\0\0", 4), ""), "not valid JSON"},
      {file_of(" {}", ""), "does not begin with '{'"},
      {file_of("\xef\xbb\xbf{}", ""), "does not begin with '{'"},
      {file_of("[]", ""), "does not begin with '{'"},
      {file_of("{/**/}", ""), "not valid JSON"},
      {file_of("{" + f + "}", "abc"), "is truncated: tensor 't' ends at byte 4"},
      {file_of("{" + f + "}", "abcde"), "1 bytes after the last tensor"},
      {file_of("{}", "a"), "1 bytes after the last tensor"},
      {file_of("{" + f + "," + f + "}", four), "names 't' twice"},
      {file_of(R"({"t":{"dtype":"F32","dtype":"U8","shape":[1],"data_offsets":[0,4]}})", four), "names 'dtype' twice"},
      {file_of("{" + f + "," + entry("u", "F32", "[1]", "[0,4]") + "}", four), "overlap"},
      {file_of("{" + f + "," + entry("u", "F32", "[1]", "[2,6]") + "}", "abcdef"), "overlap"},
      {file_of("{" + f + "," + entry("u", "F32", "[1]", "[5,9]") + "}", "abcdefghi"), "hole before the data of tensor 'u'"},
      {file_of("{" + entry("t", "F32", "[1]", "[4,8]") + "}", "abcdefgh"), "hole before"},
      {file_of("{" + entry("t", "F32", "[1]", "[4,0]") + "}", four), "end before they begin"},
      {file_of("{" + entry("t", "F32", "[2]", "[0,4]") + "}", four), "needs 8 bytes but has 4"},
      {file_of("{" + entry("t", "F32", "[4294967296,4294967296]", "[0,4]") + "}", four), "overflows"},
      {file_of("{" + entry("t", "F32", "[4611686018427387904]", "[0,4]") + "}", four), "overflows"},
      {file_of("{" + entry("t", "F32", "[18446744073709551615]", "[0,4]") + "}", four), "overflows"},
      {file_of("{" + entry("t", "F32", "[0,18446744073709551615]", "[0,0]") + "}", ""), "overflows"},
      {file_of("{" + entry("t", "F32", "[0,4294967296,4294967296]", "[0,0]") + "}", ""), "overflows"},
      {file_of("{" + entry("t", "F32", "[18446744073709551616]", "[0,4]") + "}", four), "whole numbers"},
      {file_of("{" + entry("t", "F32", "[-1]", "[0,4]") + "}", four), "whole numbers"},
      {file_of("{" + entry("t", "F32", "[1.0]", "[0,4]") + "}", four), "whole numbers"},
      {file_of("{" + entry("t", "F32", "[\"1\"]", "[0,4]") + "}", four), "whole numbers"},
      {file_of("{" + entry("t", "F32", "[1]", "[-4,0]") + "}", four), "whole numbers"},
      {file_of("{" + entry("t", "F32", "[1]", "[0,4,8]") + "}", four), "must be [begin, end]"},
      {file_of("{" + entry("t", "F32", "1", "[0,4]") + "}", four), "shape must be a list"},
      {file_of("{" + entry("t", "F8_E4M3", "[2]", "[0,4]") + "}", four), "has the element type F8_E4M3"},
      {file_of("{" + entry("t", "F32", "[1,1,1,1,1,1,1]", "[0,4]") + "}", four), "has 7 axes"},
      {file_of(R"({"t":{"dtype":1,"shape":[1],"data_offsets":[0,4]}})", four), "dtype must be text"},
      {file_of(R"({"t":{"shape":[1],"data_offsets":[0,4]}})", four), "has no dtype"},
      {file_of(R"({"t":{"dtype":"F32","data_offsets":[0,4]}})", four), "has no shape"},
      {file_of(R"({"t":{"dtype":"F32","shape":[1]}})", four), "has no data_offsets"},
      {file_of(R"({"t":[1]})", ""), "not described by an object"},
      {file_of(R"({"__metadata__":{"a":1}})", ""), "value of 'a' is not text"},
      {file_of(R"({"__metadata__":"a"})", ""), "must map text to text"},
      {file_of("{\"t\":" + std::string(10'000, '['), ""), "nested deeper"},
      {file_of("{\"t\":{\"a\":{\"b\":{\"c\":{}}}}}", ""), "nested deeper"},
  };
  for (const Row& row : rows) {
    INFO(row.bytes.substr(0, 200));
    CHECK_THAT(error_of(row.bytes), Contains("w.safetensors: ") && Contains(row.message));
  }
}

TEST_CASE("safetensors: truncation and flipped header bits never crash") {
  const std::string bytes = format_safetensors(sample(), {{"k", "v"}});
  for (size_t n = 0; n < bytes.size(); ++n) CHECK(error_of(bytes.substr(0, n)) != "no error");
  for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    std::string damaged = bytes;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
    error_of(damaged);  // may still be a legal file (checksums are the manifest's work), but must end in a result or a mesa::Error
  }
}

TEST_CASE("safetensors: element types that the engine lacks become wider ones of the same value") {
  const auto read = [](const std::string& dtype, const std::string& shape, const std::string& bytes) {
    const SafetensorsFile file =
        parse_safetensors(file_of("{" + entry("x", dtype, shape, "[0," + std::to_string(bytes.size()) + "]") + "}", bytes), "w");
    return file.tensors.at(0).tensor;
  };
  const auto half = [&](uint16_t bits) {
    const Tensor x = read("F16", "[]", {static_cast<char>(bits & 255), static_cast<char>(bits >> 8)});
    CHECK(x.dtype() == DType::f32);
    return *x.data<float>();
  };
  CHECK(half(0x3c00) == 1);
  CHECK(half(0xc500) == -5);
  CHECK(half(0x3555) == 0.333251953125f);
  CHECK(half(0x7bff) == 65504);
  CHECK(half(0x0400) == 0x1p-14f);  // the smallest normal one
  CHECK(half(0x03ff) == 1023 * 0x1p-24f);
  CHECK(half(0x8001) == -0x1p-24f);
  CHECK(half(0x0000) == 0);
  CHECK_FALSE(std::signbit(half(0x0000)));
  CHECK(std::signbit(half(0x8000)));
  CHECK(half(0x7c00) == INFINITY);
  CHECK(half(0xfc00) == -INFINITY);
  CHECK(std::isnan(half(0x7e01)));
  CHECK(read("F16", "[2,0]", "").shape() == Shape{2, 0});

  const std::string two("\xff\x80\x01\x00", 4);
  CHECK(read("BOOL", "[3]", std::string("\x01\x00\x01", 3)).to_vector<uint8_t>() == std::vector<uint8_t>{1, 0, 1});
  CHECK(read("I8", "[4]", two).to_vector<int32_t>() == std::vector<int32_t>{-1, -128, 1, 0});
  CHECK(read("I16", "[2]", two).to_vector<int32_t>() == std::vector<int32_t>{-32513, 1});
  CHECK(read("U16", "[2]", two).to_vector<int32_t>() == std::vector<int32_t>{33023, 1});
  CHECK(read("U32", "[1]", "\xff\xff\xff\xff").to_vector<int64_t>() == std::vector<int64_t>{4294967295});
  CHECK_THAT(error_of(file_of("{" + entry("x", "F16", "[2]", "[0,8]") + "}", "12345678")), Contains("type F16 needs 4 bytes but has 8"));
  CHECK_THAT(error_of(file_of("{" + entry("x", "F16", "[4611686018427387904]", "[0,8]") + "}", "12345678")), Contains("overflows"));
}
