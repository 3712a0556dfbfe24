// tools/pth_to_safetensors.py on files of torch.save: what it writes is what PyTorch has, and what could run code, or is damaged, is
// refused. Needs python3 alone, and ends with a warning where there is none.
#include <catch2/catch.hpp>
#include <cstring>
#include <filesystem>

#include "mesa/base/files.h"
#include "mesa/train/safetensors.h"
#include "support/data_files.h"
#include "support/paths.h"
#include "support/process.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;
namespace fs = std::filesystem;

namespace {

bool has_python() {
  static const bool found = run("/usr/bin/env", {"python3", "-c", "import sys; sys.exit(sys.version_info < (3, 8))"}).code == 0;
  if (!found) WARN("python3 is not here: the converter is not tested");
  return found;
}

std::string fixture(const std::string& name) { return source_dir() + "/tests/golden/pth/" + name; }

struct Converter {
  TemporaryFolder folder;
  std::string path(const std::string& name) const { return (folder.path() / name).string(); }
  ProcessResult operator()(const std::string& input, std::vector<std::string> more = {}) const {
    std::vector<std::string> args{"python3", source_dir() + "/tools/pth_to_safetensors.py", input, path("out.safetensors")};
    args.insert(args.end(), more.begin(), more.end());
    return run("/usr/bin/env", args, {{"PYTHONDONTWRITEBYTECODE", "1"}}, folder.path().string());
  }
  SafetensorsFile result() const { return read_safetensors(path("out.safetensors")); }
  /// The text of a refusal, after which nothing may be left behind.
  std::string refusal(const std::string& input, const std::vector<std::string>& more = {}) const {
    const ProcessResult result = (*this)(input, more);
    CHECK(result.code == 1);
    CHECK_THAT(result.err, Contains("pth_to_safetensors: ") && !Contains("Traceback"));
    CHECK_FALSE(fs::exists(path("out.safetensors")));
    for (const auto& entry : fs::directory_iterator(folder.path())) CHECK(entry.path().extension() != ".partial");
    return result.err;
  }
};

void check_equal(const SafetensorsFile& found, const SafetensorsFile& expected, double times = 1) {
  REQUIRE(found.tensors.size() == expected.tensors.size());
  for (const NamedTensor& t : expected.tensors) {
    INFO(t.name);
    const Tensor* tensor = found.find(t.name);
    REQUIRE(tensor != nullptr);
    CHECK(tensor->dtype() == t.tensor.dtype());
    REQUIRE(tensor->shape() == t.tensor.shape());
    if (times == 1 && t.tensor.bytes() > 0) CHECK(std::memcmp(tensor->raw(), t.tensor.raw(), t.tensor.bytes()) == 0);
  }
}

using namespace std::string_literals;

/// Magic number, version, system, the object, the list of storages and what follows it.
std::string legacy(const std::string& object, const std::string& storages = "\x80\x02].") {
  const std::string magic = "\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\x2e"s;
  return magic + "\x80\x02M\xe9\x03.\x80\x02}."s + object + storages;
}

std::string unicode(const std::string& s) { return "X"s + char(s.size()) + "\0\0\0"s + s; }  // BINUNICODE
const std::string kTwoTo62 = "\x8a\x08\0\0\0\0\0\0\0\x40"s;                               // LONG1

/// A tensor of storage "0" of floats; its parts are pickles of their own.
std::string tensor(const std::string& numel, const std::string& shape, const std::string& stride) {
  return "ctorch._utils\n_rebuild_tensor_v2\n(("s + unicode("storage") + "ctorch\nFloatStorage\n" + unicode("0") + unicode("cpu") + numel +
         "tQK\0"s + shape + stride + "tR";
}

const std::string kOneKey = "\x80\x02]"s + unicode("0") + "a.";
const std::string kOneValue = kOneKey + "\1\0\0\0\0\0\0\0\0\0\x80\x3f"s;  // its length, 1.0f

}  // namespace

TEST_CASE("converter: both formats of torch.save, views, element types and prefixes give PyTorch's values") {
  if (!has_python()) return;
  const SafetensorsFile expected = read_safetensors(fixture("expected.safetensors"));
  CHECK(expected.tensors.size() == 12);
  for (const std::string name : {"zip.pth", "legacy.pth", "timm.pth", "bare.pth"}) {
    INFO(name);
    const Converter convert;
    const ProcessResult result = convert(fixture(name));
    INFO(result.err);
    REQUIRE(result.code == 0);
    CHECK_THAT(result.out, Contains("12 tensors") && Contains("F16"));
    check_equal(convert.result(), expected);
  }
  const Tensor* transposed = expected.find("blocks.1.transposed");
  REQUIRE(transposed != nullptr);
  CHECK(transposed->shape() == Shape{6, 4});
  CHECK(transposed->to_vector<double>()[1] == -0.25);  // element (1, 0) of the storage: 6 / 8 - 1
  CHECK(expected.find("blocks.0.f16")->to_vector<double>()[2] == 65504);
  CHECK(expected.find("blocks.1.num_batches_tracked")->to_vector<int64_t>() == std::vector<int64_t>{1251});
}

TEST_CASE("converter: a moving average, a table by its key, and what is not there") {
  if (!has_python()) return;
  const Converter convert;
  REQUIRE(convert(fixture("zip.pth"), {"--ema"}).code == 0);
  const SafetensorsFile ema = convert.result();
  CHECK(ema.find("blocks.0.f32")->to_vector<double>().back() == 2 * (23.0 / 8 - 1));
  REQUIRE(convert(fixture("zip.pth"), {"--key", "model"}).code == 0);
  CHECK(convert.result().find("blocks.0.f32")->to_vector<double>().back() == 23.0 / 8 - 1);
  fs::remove(convert.path("out.safetensors"));
  CHECK_THAT(convert.refusal(fixture("timm.pth"), {"--ema"}), Contains("holds no moving average") && Contains("'state_dict'"));
  CHECK_THAT(convert.refusal(fixture("zip.pth"), {"--key", "optimizer"}), Contains("'optimizer' is no table of weights"));
  CHECK_THAT(convert.refusal(fixture("zip.pth"), {"--key", "modell"}), Contains("there is no 'modell'") && Contains("'model_ema'"));
}

TEST_CASE("converter: a pickle that asks for code is refused with the name it asks for, and nothing is run") {
  if (!has_python()) return;
  for (const std::string name : {"evil.pth", "evil_legacy.pth"}) {
    const Converter convert;
    CHECK_THAT(convert.refusal(fixture(name)), Contains("asks for 'posix.system'"));
    CHECK_FALSE(fs::exists(convert.path("evil-was-here")));
    CHECK(convert(fixture(name), {"--inert", "posix.system"}).code == 0);  // a stand-in is made, and still nothing is run
    CHECK_FALSE(fs::exists(convert.path("evil-was-here")));
    CHECK(convert.result().tensors.size() == 1);
  }
  const Converter convert;
  CHECK_THAT(convert.refusal(fixture("module.pth")), Contains("asks for 'torch.nn.modules.linear.Linear'"));
}

TEST_CASE("converter: hostile pickles by hand") {
  if (!has_python()) return;
  const Converter convert;
  const auto refusal = [&](const std::string& bytes) {
    convert.folder.write("bad.pth", {bytes.begin(), bytes.end()});
    return convert.refusal(convert.path("bad.pth"));
  };
  CHECK_THAT(refusal(legacy("\x80\x02}.")), Contains("no table of weights"));
  CHECK_THAT(refusal(legacy("\x80\x02"
                            "cbuiltins\neval\n(X\x01\0\0\0001tR."s)),
             Contains("asks for 'builtins.eval'"));
  CHECK_THAT(refusal(legacy("\x80\x04\x8c\x0b"
                            "collections\x8c\x14OrderedDict.__init__\x93."s)),
             Contains("OrderedDict.__init__"));
  CHECK_THAT(refusal(legacy("\x80\x02"
                            "ctorch._utils\n_rebuild_tensor_v2\n}X\x01\0\0\0ak\x86"
                            "b."s)),
             !Contains("Traceback"));
  // Attributes of a class, a memo of 2^31 places, and a key whose hash would take 2^60 steps.
  CHECK_THAT(refusal(legacy("\x80\x02"
                            "ccollections\nOrderedDict\nN}X\x01\0\0\0aX\x01\0\0\0bs\x86"
                            "b."s)),
             Contains("damaged"));
  CHECK_THAT(refusal(legacy("\x80\x02}r\xff\xff\xff\x7f."s)), Contains("no table of weights"));
  std::string laughs = "\x80\x02})";
  for (int i = 0; i < 60; ++i) laughs += "2\x86";  // DUP, TUPLE2
  CHECK_THAT(refusal(legacy(laughs + "Ns.")), Contains("keys that are neither text nor numbers"));
  CHECK_THAT(refusal(legacy("\x80\x02"
                            "ccollections\nOrderedDict\n]" +
                            laughs.substr(3) +
                            "N\x86"
                            "a\x85R.")),
             Contains("keys that are neither text nor numbers"));
  // Few bytes that would take all memory.
  CHECK_THAT(refusal(legacy("\x80\x05}\x96\0\0\0\0\x10\0\0\0."s)), Contains("bytearray"));
  std::string pairs = "\x80\x02](", items = "\x80\x02](";
  for (int i = 0; i < 20000; ++i) pairs += "K\1N\x86", items += "K\1";
  pairs += "eq\0"s, items += "eq\0"s;
  for (int i = 0; i < 100; ++i) pairs += "ccollections\nOrderedDict\nh\0\x85R"s, items += "ctorch\nSize\nh\0\x85R"s;
  CHECK_THAT(refusal(legacy(pairs + ".")), Contains("more than 1048576 pairs"));
  CHECK_THAT(refusal(legacy(items + ".")), Contains("up to 8 counts"));
  // Numbers that are too large to seek by, or to print.
  const std::string table = "\x80\x02}" + unicode("w");
  CHECK_THAT(refusal(legacy(table + tensor(kTwoTo62, "K\1\x85", "K\1\x85") + "s.", kOneKey + kTwoTo62.substr(2))), Contains("truncated"));
  const std::string huge = "\x8b\xd0\x07\0\0"s + std::string(1999, '\0') + "\1\x85";
  CHECK_THAT(refusal(legacy(table + tensor("K\1", huge, "K\0\x85"s) + "s.", kOneValue)), Contains("up to 8 counts"));
  CHECK_THAT(refusal(legacy(table + tensor("K\1", kTwoTo62 + "\x85", "K\0\x85"s) + "s.", kOneValue)), Contains("repeat a few values"));
  // Names that are no text, or do something to a terminal or a shell.
  CHECK_THAT(refusal(legacy("\x80\x02}" + unicode("\xed\xa0\x80") + tensor("K\1", ")", ")") + "s.", kOneValue)), Contains("'\\ud800'"));
  CHECK_THAT(refusal(legacy("\x80\x02"
                            "ca\nb; echo PWNED #\x1b[31m\n.")),
             Contains("#\\x1b[31m'") && !Contains("\x1b") && !Contains("--inert"));
}

TEST_CASE("converter: what lies beside the weights is passed over, and model. goes") {
  if (!has_python()) return;
  const Converter convert;
  const std::string object = "\x80\x02}" + unicode("model.w") + tensor("K\1", "K\3\x85", "K\0\x85"s) + "s" + unicode("\xed\xa0\x80\x1b") + "Ns" +
                             unicode("a") + "c__builtin__\nset\n]K\1a\x85Rs" + unicode("b") + "ccollections\nCounter\n}K\1K\2s\x85Rs" +
                             unicode("c") + "cpathlib._local\nPosixPath\n" + unicode("/") + "\x85Rs.";
  const std::string bytes = legacy(object, kOneValue);
  convert.folder.write("good.pth", {bytes.begin(), bytes.end()});
  const ProcessResult result = convert(convert.path("good.pth"));
  INFO(result.err);
  REQUIRE(result.code == 0);
  CHECK_THAT(result.out, Contains("'\\ud800\\x1b', 'a', 'b', 'c'"));
  const SafetensorsFile file = convert.result();
  REQUIRE(file.tensors.size() == 1);
  REQUIRE(file.find("w") != nullptr);
  CHECK(file.find("w")->to_vector<double>() == std::vector<double>{1, 1, 1});
}

TEST_CASE("converter: an output that is a link stays one, and no folder or pipe is replaced") {
  if (!has_python()) return;
  const Converter convert;
  fs::create_symlink("target.safetensors", convert.path("out.safetensors"));
  REQUIRE(convert(fixture("zip.pth")).code == 0);
  CHECK(fs::is_symlink(convert.path("out.safetensors")));
  CHECK(read_safetensors(convert.path("target.safetensors")).tensors.size() == 12);
  fs::remove(convert.path("out.safetensors"));
  fs::create_symlink("/dev/null", convert.path("out.safetensors"));
  const ProcessResult result = convert(fixture("zip.pth"));
  CHECK(result.code == 1);
  CHECK_THAT(result.err, Contains("no regular file") && !Contains("Traceback"));
  CHECK(fs::is_character_file("/dev/null"));
}

TEST_CASE("converter: truncated and odd files are refused with a reason") {
  if (!has_python()) return;
  const Converter convert;
  for (const std::string name : {"zip.pth", "legacy.pth"}) {
    const std::string whole = read_text(fixture(name));
    for (int part = 0; part < 16; ++part) {
      const std::string bytes = whole.substr(0, whole.size() * part / 16);
      convert.folder.write("cut.pth", {bytes.begin(), bytes.end()});
      INFO(name << " cut to " << bytes.size() << " bytes");
      convert.refusal(convert.path("cut.pth"));
    }
  }
  std::string flipped = read_text(fixture("bare.pth"));
  const size_t values = flipped.find(std::string("\0\0\x80\xbf\0\0\x60\xbf", 8));  // -1, -0.875: the first storage
  REQUIRE(values != std::string::npos);
  flipped[values] ^= 1;
  convert.folder.write("flipped.pth", {flipped.begin(), flipped.end()});
  CHECK_THAT(convert.refusal(convert.path("flipped.pth")), Contains("damaged"));
  CHECK_THAT(convert.refusal(fixture("expected.safetensors")), Contains("a safetensors file already"));
  CHECK_THAT(convert.refusal(convert.path("nowhere.pth")), Contains("nowhere.pth"));
  const std::string text = "no pickle at all";
  convert.folder.write("text.pth", {text.begin(), text.end()});
  CHECK_THAT(convert.refusal(convert.path("text.pth")), Contains("neither a zip archive nor a pickle"));
}
