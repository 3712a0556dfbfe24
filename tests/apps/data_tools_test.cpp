// mesa-train --check-data and --pack, and runs on what they made.
#include "mesa/train/data_tools.h"

#include <sys/stat.h>

#include "apps/tiny_run.h"
#include "mesa/train/files.h"
#include "mesa/train/safetensors.h"
#include "mesa/train/setup.h"
#include "support/many_formats.h"

using namespace mesa::testing;
using Catch::Matchers::Contains;
namespace fs = std::filesystem;

namespace {
/// Two halves of pictures below "pictures"; returns the keys that name them.
Args write_pictures(const TinyRun& tiny, int train = 24, int test = 6) {
  for (int i = 0; i < train + test; ++i) {
    const std::string folder = std::string("pictures/") + (i < train ? "train/" : "val/") + (i % 3 == 0 ? "few" : "many");
    fs::create_directories(tiny.path(folder));
    const Bytes bytes = encode_jpeg(test_image(30 + i % 7, 40 - i % 5, 3), 90);
    tiny.write(folder + "/" + std::to_string(i) + ".jpg", {bytes.begin(), bytes.end()});
  }
  return {"data.kind=image_folder", "data.path=pictures", "data.train_size=0",
          "data.test_size=0",       "train.batch_size=4", "data.crop=resized"};
}

/// The tensors, without the config that stands beside them.
std::string weights_of(const TinyRun& tiny, const std::string& run) {
  return mesa::format_safetensors(mesa::read_safetensors(tiny.path(run + "/checkpoints/last/model.safetensors")).tensors, {});
}

std::string bytes_of(const TinyRun& tiny, const std::string& name) { return read_text(tiny.path(name)); }
}  // namespace

TEST_CASE("data tools: a run on the packed file equals the one on the folder, also resumed in mid-epoch") {
  const TinyRun tiny;
  Args sets = write_pictures(tiny);
  REQUIRE(tiny.train(sets, "folder").code == 0);
  const ProcessResult packed = tiny.train(sets, "none", {"--pack", "all.pack"});
  INFO(packed.err);
  REQUIRE(packed.code == 0);
  CHECK_THAT(packed.out, Contains("all.pack: 24 training and 6 test images of 2 classes") &&
                             Contains("--set data.kind=packed --set data.path=all.pack\n"));
  CHECK_FALSE(tiny.exists("none"));
  CHECK_FALSE(tiny.exists("all.pack.tmp"));
  sets[0] = "data.kind=packed", sets[1] = "data.path=all.pack";
  Args limited = sets;
  limited.push_back("train.steps=8"), limited.push_back("schedule.name=constant");
  sets.push_back("schedule.name=constant");
  REQUIRE(tiny.train(sets, "packed").code == 0);
  REQUIRE(tiny.train(limited, "resumed").code == 0);
  REQUIRE(tiny.train(sets, "resumed", {"--resume"}).code == 0);
  CHECK(weights_of(tiny, "packed") == weights_of(tiny, "resumed"));
  sets[0] = "data.kind=image_folder", sets[1] = "data.path=pictures";
  REQUIRE(tiny.train(sets, "straight").code == 0);
  CHECK(weights_of(tiny, "packed") == weights_of(tiny, "straight"));
  CHECK(tiny.eval({"folder", "--set", "data.kind=packed", "--data", "all.pack"}).code == 0);
  const ProcessResult plan =
      tiny.train({"data.kind=packed", "data.path=all.pack", "data.train_size=0", "data.test_size=0"}, "none", {"--dry-run"});
  CHECK(plan.code == 0);
  CHECK_THAT(plan.out, Contains("classes: 2"));
  const Json row = Json::parse(bytes_of(tiny, "folder/metrics.jsonl").substr(0, bytes_of(tiny, "folder/metrics.jsonl").find('\n')));
  double sum = 0;
  for (const char* key : {"data_read", "data_decode", "data_augment"}) {
    CHECK(row[key].get<double>() > 0);
    sum += row[key].get<double>();
  }
  CHECK(sum <= 1.01);
}

TEST_CASE("data tools: packing reduces, stores pixels, and says how they are normalized") {
  const TinyRun tiny;
  const Args sets = write_pictures(tiny);
  REQUIRE(tiny.train(sets, "none", {"--pack", "all.pack"}).code == 0);
  REQUIRE(tiny.train(sets, "none", {"--pack", "small.pack", "--pack-size", "16"}).code == 0);
  REQUIRE(tiny.train(sets, "none", {"--pack", "raw.pack", "--pack-size", "16", "--pack-raw"}).code == 0);
  CHECK(fs::file_size(tiny.path("small.pack")) < fs::file_size(tiny.path("all.pack")));
  mesa::DataOptions options;
  options.kind = "packed", options.path = tiny.path("raw.pack");
  CHECK(mesa::open_datasets(options).train->get(0).image.width >= 16);
  CHECK_FALSE(mesa::open_datasets(options).train->stored(0)->is_file());
  const ProcessResult shapes = tiny.train({}, "none", {"--pack", "shapes.pack"});
  CHECK_THAT(shapes.out, Contains("96 training and 32 test") && Contains("--set data.mean=[0.5,0.5,0.5] --set data.std=[0.5,0.5,0.5]"));
  for (const Args& wrong : {Args{"--pack-size", "16"}, Args{"--pack-raw"}, Args{"--pack", "x", "--check-data"},
                            Args{"--pack", "x", "--dry-run"}, Args{"--pack", "x", "--pack-size", "-1"}})
    CHECK(tiny.train(sets, "none", wrong).code == 2);
  const ProcessResult nowhere = tiny.train(sets, "none", {"--pack", "nowhere/x"});
  CHECK(nowhere.code == 1);
  CHECK_THAT(nowhere.err, Contains("nowhere/x"));
}

TEST_CASE("data tools: damaged pictures stop the packing or are left out, and are listed by the check") {
  const TinyRun tiny;
  Args sets = write_pictures(tiny);
  const ProcessResult good = tiny.train(sets, "none", {"--check-data"});
  CHECK(good.code == 0);
  CHECK_THAT(good.out, Contains("training: 24 good and 0 damaged images of 2 classes; smallest 'few' with 8, largest 'many' with 16") &&
                           Contains("test: 6 good and 0 damaged"));
  CHECK_THAT(good.err, Contains("checking  ") && Contains("30/30 images") && !Contains("\r"));
  tiny.write("pictures/train/many/1.jpg", "no picture");
  tiny.write("pictures/val/few/24.jpg", bytes_of(tiny, "pictures/val/few/24.jpg").substr(0, 400));
  const ProcessResult bad = tiny.train(sets, "none", {"--check-data"});
  CHECK(bad.code == 1);
  CHECK_THAT(bad.out, Contains("damaged: pictures/train/many/1.jpg: is neither a JPEG nor a PNG") &&
                          Contains("damaged: pictures/val/few/24.jpg: is a damaged JPEG") && Contains("training: 23 good and 1 damaged") &&
                          Contains("largest 'many' with 15") && Contains("test: 5 good and 1 damaged"));
  tiny.write("out.pack", "what was there");
  const ProcessResult strict = tiny.train(sets, "none", {"--pack", "out.pack"});
  CHECK(strict.code == 1);
  CHECK_THAT(strict.err, Contains("many/1.jpg") && Contains("data.on_bad_sample: skip"));
  CHECK(bytes_of(tiny, "out.pack") == "what was there");
  CHECK_FALSE(tiny.exists("out.pack.tmp"));
  sets.push_back("data.on_bad_sample=skip");
  const ProcessResult skipping = tiny.train(sets, "none", {"--pack", "out.pack"});
  CHECK(skipping.code == 0);
  CHECK_THAT(skipping.out, Contains("23 training and 5 test") && Contains("2 damaged ones left out"));
  CHECK_THAT(skipping.err, Contains("a bad sample is left out: pictures/val/few/24.jpg"));
  CHECK(tiny.train({"data.kind=packed", "data.path=out.pack", "data.train_size=0", "data.test_size=0"}, "none", {"--check-data"}).code ==
        0);
  std::string bytes = bytes_of(tiny, "out.pack");
  bytes[100] ^= 1;
  tiny.write("out.pack", bytes);
  const ProcessResult damaged =
      tiny.train({"data.kind=packed", "data.path=out.pack", "data.train_size=0", "data.test_size=0"}, "none", {"--check-data"});
  CHECK(damaged.code == 1);
  CHECK_THAT(damaged.out, Contains("damaged: out.pack: record 0 is damaged: wrong checksum"));
}

TEST_CASE("data tools: a disk that fails anywhere leaves the old packed file", "[data]") {
  const TinyRun tiny;
  mesa::RunConfig config = mesa::parse_config(kTinyConfig, "tiny", {"storage=[{match: \"*\", codec: exact}]", "data.train_size=40"});
  const std::string path = tiny.path("out.pack");
  mesa::pack_data(config, {path});
  const std::string old = read_text(path);
  config.seed = 1;
  int operations = 0;
  mesa::set_file_fault([&](std::string_view, const std::string&) { return ++operations, 0; });
  mesa::pack_data(config, {path});
  const std::string changed = read_text(path);
  CHECK(changed != old);
  CHECK(operations >= 6);
  for (int at = 1; at <= operations; ++at) {
    tiny.write("out.pack", old);
    int count = 0;
    mesa::set_file_fault([&](std::string_view, const std::string&) { return ++count == at ? ENOSPC : 0; });
    std::string error;
    try {
      mesa::pack_data(config, {path});
    } catch (const mesa::Error& e) {
      error = e.what();
    }
    mesa::set_file_fault({});
    CHECK_THAT(error, Contains("No space left on device"));
    const std::string found = read_text(path);
    CHECK((found == old || (at == operations && found == changed)));  // the last one syncs the folder
    CHECK_FALSE(tiny.exists("out.pack.tmp"));
  }
}

TEST_CASE("data tools: the hostile pictures are told from the good ones", "[shared]") {
  const auto hostile = shared_data("hostile");
  if (!hostile) {
    WARN("skipped: the shared data sets are absent");
    return;
  }
  const TinyRun tiny;
  for (const char* half : {"train", "val"}) {
    fs::create_directories(tiny.path(std::string("odd/") + half));
    fs::create_directory_symlink(fs::absolute(*hostile), tiny.path(std::string("odd/") + half + "/all"));
  }
  const ProcessResult result =
      tiny.train({"data.kind=image_folder", "data.path=odd", "data.train_size=0", "data.test_size=0"}, "none", {"--check-data"});
  CHECK(result.code == 1);
  for (const char* bad : {"broken.png", "truncated_jpeg.jpg", "truncated_image.png", "max_size.jpg", "empty.jpg", "xs1n0g01.png"})
    CHECK_THAT(result.out, Contains(std::string("/all/") + bad + ": "));
  for (const char* fine : {"hopper_gray.jpg", "pil_sample_cmyk.jpg"}) CHECK_THAT(result.out, !Contains(fine));
}
