// mesa-eval beside its totals: classes, confusion, reassessed labels, mirror images, weights from elsewhere.
#include "apps/tiny_run.h"
#include "mesa/data/image.h"
#include "mesa/train/metrics.h"
#include "mesa/train/safetensors.h"

using namespace mesa::testing;
using Catch::Matchers::Contains;
namespace fs = std::filesystem;

namespace {

/// Pictures of `cat` and `dog`, named as ImageNet's test pictures are: those of cat have odd numbers.
void write_pictures(const TinyRun& tiny) {
  int number = 0;
  for (const std::string half : {"val", "train"})
    for (int i = 0; i < 5; ++i)
      for (const std::string name : {"cat", "dog"}) {
        fs::create_directories(tiny.path("data/" + half + "/" + name));
        char file[64];
        std::snprintf(file, sizeof file, "ILSVRC2012_val_%08d.png", ++number);
        const Bytes bytes = encode_png(test_image(16 + i, 17, 3));
        tiny.write("data/" + half + "/" + name + "/" + file, {bytes.begin(), bytes.end()});
      }
}

const Args kPictures{"data.kind=image_folder", "data.path=data",     "data.train_size=0",
                     "data.test_size=0",       "train.batch_size=4", "train.epochs=1"};

}  // namespace

TEST_CASE("mesa-eval: classes and confusion on the terminal, in files and in JSON say the same as the totals") {
  const TinyRun tiny;
  REQUIRE(tiny.train({"data.test_size=53"}).code == 0);
  const ProcessResult result =
      tiny.eval({"run/checkpoints/last", "--json", "o.json", "--per-class=c.csv", "--confusion", "c.png", "--batch-size", "7"});
  INFO(result.err);
  REQUIRE(result.code == 0);
  const Json out = tiny.json("o.json");
  const auto rows = mesa::parse_csv(read_text(tiny.path("c.csv")));
  REQUIRE(rows.size() == 11);
  REQUIRE(out["classes"].size() == 10);
  CHECK(out["flip"] == false);
  double hits = 0, hits5 = 0, images = 0, mean = 0;
  for (size_t i = 1; i < rows.size(); ++i) {
    const double n = std::stod(rows[i][2]);
    images += n, hits += n * std::stod(rows[i][3]) / 100, hits5 += n * std::stod(rows[i][4]) / 100, mean += std::stod(rows[i][3]) / 10;
    CHECK(out["classes"][i - 1]["name"] == rows[i][1]);
    CHECK(out["classes"][i - 1]["images"] == n);
    CHECK(out["classes"][i - 1]["top1"] == std::stod(rows[i][3]));
  }
  CHECK(images == 53);
  CHECK(100 * hits / images == Approx(out["top1"].get<double>()));
  CHECK(100 * hits5 / images == Approx(out["top5"].get<double>()));
  CHECK(mean == Approx(out["top1_class_mean"].get<double>()));
  int64_t cells = 0, right = 0;
  for (const Json& cell : out["confusion"]) cells += cell[2].get<int64_t>(), right += cell[0] == cell[1] ? cell[2].get<int64_t>() : 0;
  CHECK(cells == 53);
  CHECK(100.0 * static_cast<double>(right) / 53 == Approx(out["top1"].get<double>()));
  const mesa::Image picture = mesa::read_image(tiny.path("c.png"));
  CHECK(picture.width > 440);
  CHECK_THAT(result.out, Contains(" taken for "));
  // The same counts lie in the run's folder, and its report shows them.
  const Json kept = tiny.json("run/confusion.json");
  CHECK(kept["cells"] == out["confusion"]);
  CHECK(mesa::parse_csv(read_text(tiny.path("run/classes.csv"))) == rows);
  CHECK_THAT(read_text(tiny.path("run/report.html")), Contains("Classes of the test set"));

  const ProcessResult terminal = tiny.eval({"run/checkpoints/last", "--per-class", "--confusion", "c.csv"});
  CHECK(terminal.code == 0);
  CHECK_THAT(terminal.out, Contains("precision  class, most often taken for") && Contains("crescent"));
  CHECK(mesa::parse_csv(read_text(tiny.path("c.csv"))).size() == out["confusion"].size() + 1);
  CHECK(tiny.eval({"run", "--confusion", "c.jpg"}).code == 2);
  CHECK_THAT(tiny.eval({"run", "--confusion", "nowhere/c.png"}).err, Contains("nowhere/c.png"));
}

TEST_CASE("mesa-eval: reassessed labels, and mirror images") {
  const TinyRun tiny;
  write_pictures(tiny);
  REQUIRE(tiny.train(kPictures).code == 0);
  const auto predictions = [&](const Args& more) {
    Args args{"run", "--json", "o.json"};
    args.insert(args.end(), more.begin(), more.end());
    const ProcessResult result = tiny.eval(args);
    INFO(result.err);
    REQUIRE(result.code == 0);
    return tiny.json("o.json");
  };
  std::string all, none;
  for (int i = 0; i < 10; ++i) all += i > 0 ? ", [0, 1]" : "[[0, 1]", none += i > 0 ? ", []" : "[[]";
  tiny.write("all.json", all + "]");
  tiny.write("none.json", none + "]");
  const Json every = predictions({"--real", "all.json"});
  CHECK(every["real"]["top1"] == 100);
  CHECK(every["real"]["images"] == 10);
  CHECK(predictions({"--real", "none.json"})["real"]["unlabelled"] == 10);
  tiny.write("bad.json", "[[0], [7]]");
  const ProcessResult bad = tiny.eval({"run", "--real", "bad.json"});
  CHECK(bad.code == 1);
  CHECK_THAT(bad.err, Contains("bad.json: "));

  const Json plain = predictions({}), flipped = predictions({"--flip"}), by_key = predictions({"--set", "data.eval_flip=true"});
  CHECK(flipped["flip"] == true);
  CHECK(flipped["loss"] != plain["loss"]);
  CHECK(flipped["loss"] == by_key["loss"]);
}

TEST_CASE("mesa-eval: what each picture is taken for") {
  const TinyRun tiny;
  write_pictures(tiny);
  REQUIRE(tiny.train(kPictures).code == 0);
  const ProcessResult predicted = tiny.eval({"run/checkpoints/last", "--predictions", "p.csv", "--json", "o.json"});
  INFO(predicted.err);
  REQUIRE(predicted.code == 0);
  const auto table = mesa::parse_csv(read_text(tiny.path("p.csv")));
  REQUIRE(table.size() == 11);
  REQUIRE((table[0].size() == 9 && table[0][0] == "picture" && table[0][5] == "top1_probability" && table[0][6] == "top2"));
  int right = 0;
  for (size_t i = 1; i < table.size(); ++i) {
    CHECK_THAT(table[i][0], Contains("/" + table[i][2] + "/"));  // its folder is its class
    CHECK((table[i][3] != table[i][6] && table[i][4] != table[i][7]));
    const double first = std::stod(table[i][5]), second = std::stod(table[i][8]);
    CHECK((first >= second && first + second == Approx(1)));
    right += table[i][1] == table[i][3];
  }
  CHECK(10.0 * right == tiny.json("o.json")["top1"]);
}

TEST_CASE("mesa-eval and mesa-train: weights of a file that does not say its model") {
  const TinyRun tiny;
  REQUIRE(tiny.train().code == 0);
  REQUIRE(tiny.eval({"run", "--json", "own.json"}).code == 0);
  mesa::SafetensorsFile file = mesa::read_safetensors(tiny.path("run/checkpoints/best/model.safetensors"));
  for (mesa::NamedTensor& tensor : file.tensors) tensor.name = "module." + tensor.name;
  mesa::write_safetensors(tiny.path("bare.safetensors"), file.tensors);
  CHECK_THAT(tiny.eval({"bare.safetensors"}).err, Contains("does not say which model it belongs to") && Contains("--config"));
  const ProcessResult result = tiny.eval({"bare.safetensors", "--config", "tiny.yaml", "--json", "bare.json"});
  INFO(result.err);
  REQUIRE(result.code == 0);
  CHECK(tiny.json("bare.json")["loss"] == tiny.json("own.json")["loss"]);
  const ProcessResult other = tiny.eval({"bare.safetensors", "--config", "tiny.yaml", "--set", "model.depth=3"});
  CHECK(other.code == 1);
  CHECK_THAT(other.err, Contains("missing blocks.[1-2].norm1.weight [24]"));

  const ProcessResult begun = tiny.train({"train.epochs=1"}, "begun", {"--weights", "bare.safetensors"});
  CHECK(begun.code == 0);
  CHECK_THAT(begun.err, Contains("started from bare.safetensors"));
  const ProcessResult wrong = tiny.train({"model.width=48"}, "wrong", {"--weights", "bare.safetensors"});
  CHECK(wrong.code == 2);
  CHECK_THAT(wrong.err, Contains("--weights bare.safetensors: train.weights: ") && Contains("belongs to another model"));
}
