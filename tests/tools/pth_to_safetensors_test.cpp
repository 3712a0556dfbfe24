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
    CHECK_FALSE(fs::exists(path("out.safetensors.partial")));
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
  using namespace std::string_literals;
  const auto legacy = [](const std::string& object) {  // magic number, version, system, the object, no storages
    const std::string magic = "\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\x2e"s;
    return magic + "\x80\x02M\xe9\x03.\x80\x02}."s + object + "\x80\x02]."s;
  };
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
