// What the world does to a program: odd files, closed streams, limits, half a data set.
#include <fstream>

#include "apps/tiny_run.h"
#include "support/kernels.h"
#include "mesa/train/safetensors.h"

using namespace mesa::testing;
using Catch::Matchers::Contains;
namespace fs = std::filesystem;

namespace {

/// `command` by a shell in the run's folder; $BIN is where the programs are.
ProcessResult shell(const TinyRun& tiny, const std::string& command) {
  return run("/bin/sh", {"-c", "BIN=" MESA_BIN_DIR "; " + command}, {}, tiny.path("."));
}

/// Pictures of two classes below `folder`.
void write_pictures(const TinyRun& tiny, const std::string& folder, int each) {
  for (const char* name : {"a", "b"}) {
    fs::create_directories(tiny.path(folder + "/" + name));
    for (int i = 0; i < each; ++i) {
      const Bytes bytes = encode_png(test_image(16 + i, 16, 3));
      tiny.write(folder + "/" + name + "/" + std::to_string(i) + ".png", std::string(bytes.begin(), bytes.end()));
    }
  }
}

const Args kPictures{"data.kind=image_folder", "data.path=pictures", "data.train_size=0", "data.test_size=0", "train.batch_size=4", "train.epochs=1"};

}  // namespace

TEST_CASE("hostile: a class folder whose name is not UTF-8 is refused before training") {
  const TinyRun tiny;
  write_pictures(tiny, "pictures/train", 4);
  write_pictures(tiny, "pictures/val", 2);
  for (const char* half : {"train", "val"}) fs::rename(tiny.path(std::string("pictures/") + half + "/a"), tiny.path(std::string("pictures/") + half + "/caf\xe9"));
  const ProcessResult result = tiny.train(kPictures);
  CHECK(result.code == 1);
  CHECK_THAT(result.err, Contains("is not UTF-8") && !Contains("epoch 1"));
}

TEST_CASE("hostile: damaged test pictures are left out, listed and counted") {
  const TinyRun tiny;
  write_pictures(tiny, "pictures/train", 4);
  write_pictures(tiny, "pictures/val", 5);
  for (int i : {1, 2, 4}) tiny.write("pictures/val/a/" + std::to_string(i) + ".png", "no picture");
  Args sets = kPictures;
  CHECK(tiny.train(sets).code == 1);
  sets.push_back("data.on_bad_sample=skip");
  const ProcessResult trained = tiny.train(sets, "skipping");
  REQUIRE(trained.code == 0);
  CHECK_THAT(trained.err, Contains("a bad test sample is left out: ") && Contains("val/a/2.png"));
  for (const char* batch : {"1", "3", "10"}) {
    const ProcessResult result = tiny.eval({"skipping", "--json", "out.json", "--batch-size", batch});
    REQUIRE(result.code == 0);
    CHECK(tiny.json("out.json")["images"] == 7);
    CHECK(tiny.json("out.json")["left_out"] == 3);
    CHECK_THAT(result.err, Contains("val/a/1.png"));
  }
}

TEST_CASE("hostile: closed standard streams do not leak into the run's files") {
  const TinyRun tiny;
  const std::string closed = GENERATE("2>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-");  // which file would get number 2 depends on what else is closed
  CAPTURE(closed);
  CHECK(shell(tiny, "$BIN/mesa-train --config tiny.yaml --output run " + closed).code == 0);
  for (const auto& row : read_csv(tiny.path("run/summary.csv"))) CHECK(row.size() == 14);
  CHECK(tiny.metrics("run").size() == 12);
}

TEST_CASE("hostile: --json goes through links and into pipes, and is tried before the work") {
  const TinyRun tiny;
  REQUIRE(tiny.train().code == 0);
  fs::create_symlink("target.json", tiny.path("link.json"));
  REQUIRE(tiny.eval({"run", "--json", "link.json"}).code == 0);
  CHECK(fs::is_symlink(tiny.path("link.json")));
  CHECK(tiny.json("target.json").contains("top1"));
  const ProcessResult piped = shell(tiny, "$BIN/mesa-eval run --json /dev/stdout | cat");
  CHECK_THAT(piped.out, Contains("\"top1\": "));
  CHECK(fs::is_character_file("/dev/null"));
  CHECK(tiny.eval({"run", "--json", "/dev/null"}).code == 0);
  CHECK(fs::is_character_file("/dev/null"));
  const ProcessResult nowhere = tiny.eval({"run", "--json", "nowhere/out.json"});
  CHECK(nowhere.code == 1);
  CHECK_THAT(nowhere.err, Contains("nowhere/out.json"));
  CHECK(nowhere.out.empty());
}

TEST_CASE("hostile: weights that are damaged or not finite are refused by mesa-eval") {
  const TinyRun tiny;
  REQUIRE(tiny.train().code == 0);
  const std::string file = "run/checkpoints/last/model.safetensors";
  std::string bytes = read_text(tiny.path(file));
  fs::copy(tiny.path(file), tiny.path("alone.safetensors"));
  CHECK(tiny.eval({"alone.safetensors"}).code == 0);  // a file taken out of its checkpoint
  bytes[bytes.size() - 100] ^= 1;
  tiny.write(file, bytes);
  const ProcessResult damaged = tiny.eval({file});
  CHECK(damaged.code == 1);
  CHECK_THAT(damaged.err, Contains("damaged") || Contains("checksum"));
  mesa::SafetensorsFile model = mesa::read_safetensors(tiny.path("alone.safetensors"));
  std::vector<mesa::NamedTensor> tensors;
  for (auto& [name, tensor] : model.tensors) {
    if (name == "head.bias") tensor.data<float>()[3] = std::nanf("");
    tensors.push_back({name, tensor});
  }
  mesa::write_safetensors(tiny.path("nan.safetensors"), tensors, model.metadata);
  const ProcessResult nan = tiny.eval({"nan.safetensors"});
  CHECK(nan.code == 1);
  CHECK_THAT(nan.err, Contains("not finite") && Contains("head.bias (element 3)"));
}

TEST_CASE("hostile: a limit on the size of files is met like a full disk") {
  const TinyRun tiny;
  const ProcessResult result = shell(tiny, "ulimit -f 60; $BIN/mesa-train --config tiny.yaml --output run");
  CHECK(result.code == 1);
  CHECK_THAT(result.err, Contains("could not be written") && Contains("File too large"));
}

TEST_CASE("hostile: a run resumed into a new folder has a best checkpoint there, by any spelling of the path") {
  const TinyRun tiny;
  REQUIRE(tiny.train().code == 0);
  const auto resume = [&](const std::string& from, const std::string& output) {
    Args args{"--resume", from, "--set", "train.epochs=3", "--set", "optimizer.lr=1e-12"};
    if (!output.empty()) args.insert(args.end(), {"--output", output});
    return tiny.call("mesa-train", args);
  };
  const ProcessResult elsewhere = resume("run", "other");
  INFO(elsewhere.err);
  CHECK(elsewhere.code == 0);
  CHECK(tiny.exists("other/checkpoints/best/model.safetensors"));
  CHECK(resume("run/checkpoints/best/", "slash").code == 0);
  CHECK(resume(tiny.path("run/checkpoints/last"), "").code == 0);
  CHECK(shell(tiny, "cd run && $BIN/mesa-train --resume checkpoints/last").code == 0);
}

TEST_CASE("hostile: evaluation needs the test half alone, and says what it cannot use") {
  const TinyRun tiny;
  const auto write = [&](const std::string& name, const Bytes& bytes) { tiny.write(name, std::string(bytes.begin(), bytes.end())); };
  fs::create_directories(tiny.path("full"));
  fs::create_directories(tiny.path("half"));
  for (const char* name : {"full/data_batch_1.bin", "full/test_batch.bin", "half/test_batch.bin"}) write(name, cifar_bytes(20, 1, 3));
  tiny.write("full/batches.meta.txt", "plane\ncar\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n");
  REQUIRE(tiny.train({"data.kind=cifar10", "data.path=full", "data.train_size=16", "data.test_size=0", "model.image_size=32", "train.epochs=1"}).code == 0);
  const ProcessResult half = tiny.eval({"run", "--data", "half"});  // no training files, no names of classes
  INFO(half.err);
  CHECK(half.code == 0);
  CHECK_THAT(half.out, Contains("20 images"));
  CHECK(tiny.eval({"run", "--batch-size", "0"}).code == 2);
  REQUIRE(tiny.train({}, "drawn").code == 0);
  const ProcessResult drawn = tiny.eval({"drawn", "--data", "half"});
  CHECK(drawn.code == 2);
  CHECK_THAT(drawn.err, Contains("--data") && Contains("generated"));
}

TEST_CASE("hostile: impossible values are refused at their own key") {
  const TinyRun tiny;
  const auto refused = [&](const std::string& set, const std::string& key) {
    const ProcessResult result = tiny.train({set}, "run", {"--dry-run"});
    INFO(set << ": " << result.err);
    CHECK(result.code == 2);
    CHECK_THAT(result.err, Contains("--set " + set) && Contains(key + ": "));
  };
  refused("model.channels=2", "model.channels");
  refused("data.crop_padding=100", "data.crop_padding");
  refused("model.width=100", "model.width");
  const ProcessResult means = tiny.train({"data.mean=[0.5,0.5]", "data.std=[1,1]"});
  CHECK(means.code == 2);
  CHECK_THAT(means.err, Contains("data.mean") && Contains("2 values"));
  const ProcessResult wide = tiny.call("mesa-train", {"--config", "deit_s", "--set", "model.width=100", "--dry-run"});
  CHECK(wide.code == 2);
  CHECK_THAT(wide.err, Contains("--set model.width=100") && Contains("model.heads 6"));
}
