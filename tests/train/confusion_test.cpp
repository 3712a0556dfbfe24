// Confusion: counts by hand, parts of ranks added up, tables, files that are damaged, and pixels of the picture.
#include "mesa/train/confusion.h"

#include <array>
#include <catch2/catch.hpp>
#include <cmath>

#include "mesa/base/files.h"
#include "mesa/data/dataset.h"
#include "mesa/train/best_classes.h"
#include "mesa/train/metrics.h"
#include "support/data_files.h"
#include "support/errors.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

Batch batch_of(const std::vector<int64_t>& indices, const std::vector<int64_t>& labels) {
  Batch batch;
  batch.labels = Tensor::from<int64_t>({static_cast<int64_t>(labels.size())}, labels);
  batch.sample_indices = indices;
  return batch;
}

/// Six pictures of three classes; picture 5 has no prediction. Top-5 of three classes is everything that is a number.
const std::vector<int64_t> kLabels{0, 0, 0, 1, 1, 2};
const std::vector<float> kLogits{3, 1, 2, 0, 5, 5, 1, 0, 2, 9, 9, 9, 0, 1, NAN, NAN, NAN, NAN};

void take(Predictions& predictions, const std::vector<int64_t>& pictures) {
  std::vector<int64_t> labels;
  std::vector<float> logits;
  for (const int64_t i : pictures) {
    labels.push_back(kLabels[i]);
    logits.insert(logits.end(), kLogits.begin() + 3 * i, kLogits.begin() + 3 * i + 3);
  }
  predictions.take(batch_of(pictures, labels), Tensor::from<float>({static_cast<int64_t>(pictures.size()), 3}, logits));
}

std::vector<std::vector<int64_t>> plain(const std::vector<ConfusionCell>& cells) {
  std::vector<std::vector<int64_t>> out;
  for (const ConfusionCell& c : cells) out.push_back({c.truth, c.predicted, c.images});
  return out;
}

Confusion by_hand() {
  Predictions predictions(6, 3, {"cat", "a \"dog\", wet"});
  take(predictions, {0, 1, 2, 3, 4, 5});
  return predictions.finish();
}

std::array<int, 3> pixel(const Image& image, int y, int x) {
  const size_t at = (static_cast<size_t>(y) * image.width + x) * 3;
  return {image.pixels.at(at), image.pixels.at(at + 1), image.pixels.at(at + 2)};
}

}  // namespace

TEST_CASE("confusion: predictions are counted by class, ties and NaN as in top-1") {
  const Confusion c = by_hand();
  CHECK(plain(c.cells()) == std::vector<std::vector<int64_t>>{{0, 0, 1}, {0, 1, 1}, {0, 2, 1}, {1, 0, 1}, {1, 1, 1}, {2, -1, 1}});
  CHECK(c.images() == 6);
  const auto rows = c.rows();
  REQUIRE(rows.size() == 3);
  CHECK(rows[0].images == 3);
  CHECK(rows[0].hits == 1);
  CHECK(rows[0].hits5 == 3);
  CHECK(rows[0].predicted == 2);
  CHECK(rows[0].top1() == Approx(100.0 / 3));
  CHECK(rows[0].precision() == 50);
  CHECK(rows[0].confused_with == 1);  // as often as for 2
  CHECK(rows[1].top1() == 50);
  CHECK(rows[1].confused_with == 0);
  CHECK(rows[2].name == "2");
  CHECK(rows[2].hits5 == 0);
  CHECK(rows[2].confused_with == -1);
  CHECK(rows[2].top1() == 0);
  CHECK(c.mean_top1() == Approx((100.0 / 3 + 50 + 0) / 3));
  CHECK(plain(c.most_confused(2)) == std::vector<std::vector<int64_t>>{{0, 1, 1}, {0, 2, 1}});
  CHECK(std::isnan(Confusion(2).mean_top1()));
  CHECK(std::isnan(Confusion(2).rows()[0].precision()));
}

TEST_CASE("confusion: the parts of ranks add up to the whole, whatever the number of classes") {
  std::vector<std::vector<double>> notes;
  const auto keep = [&](std::vector<double>& values) { notes.push_back(values); };
  for (const auto& part : std::vector<std::vector<int64_t>>{{0, 3, 5}, {4, 1}, {2}}) {
    Predictions predictions(6, 3, {"cat", "a \"dog\", wet"});
    take(predictions, part);
    predictions.finish(keep);
  }
  Predictions last(6, 3, {"cat", "a \"dog\", wet"});
  const auto sum = [&](std::vector<double>& values) {
    for (const auto& rank : notes)
      for (size_t i = 0; i < values.size(); ++i) values[i] += rank[i];
  };
  CHECK(confusion_json(last.finish(sum), 1) == confusion_json(by_hand(), 1));
  CHECK(last.finish().images() == 0);  // nothing is left

  const int64_t many = 1'000'000;  // the largest code must stay a whole number in a double
  Predictions large(1, many, {});
  Tensor logits = Tensor::zeros({1, many}, DType::f32);
  logits.data<float>()[many - 1] = 1;
  large.take(batch_of({0}, {many - 1}), logits);
  const Confusion c = large.finish();
  CHECK(plain(c.cells()) == std::vector<std::vector<int64_t>>{{many - 1, many - 1, 1}});
  CHECK(c.rows().back().hits5 == 1);
}

TEST_CASE("confusion: tables read back, names are quoted, shares without images are empty") {
  Confusion c = by_hand();
  const auto classes = parse_csv(classes_csv(c));
  REQUIRE(classes.size() == 4);
  CHECK(classes[0] == std::vector<std::string>{"class", "name", "images", "top1", "top5", "precision", "predicted", "confused_with",
                                               "confused_with_name", "confused"});
  CHECK(classes[1][1] == "cat");
  CHECK(std::stod(classes[1][3]) == Approx(100.0 / 3));
  CHECK(classes[2] == std::vector<std::string>{"1", "a \"dog\", wet", "2", "50", "100", "50", "2", "0", "cat", "1"});
  CHECK(classes[3][6] == "1");  // the third picture of class 0
  CHECK(classes[3][5] == "0");
  const auto cells = parse_csv(confusion_csv(c));
  CHECK(cells.size() == 7);
  CHECK(cells[2] == std::vector<std::string>{"0", "cat", "1", "a \"dog\", wet", "1"});
  CHECK(cells[6] == std::vector<std::string>{"2", "2", "-1", "", "1"});
}

TEST_CASE("confusion: a file of it reads back, and a damaged one is refused with its name") {
  const TemporaryFolder folder;
  const auto error = [&](const std::string& text) {
    folder.write("confusion.json", {text.begin(), text.end()});
    return error_of([&] { read_confusion((folder.path() / "confusion.json").string()); });
  };
  const std::string good = confusion_json(by_hand(), 4);
  CHECK(error(good) == "");
  CHECK(confusion_json(read_confusion((folder.path() / "confusion.json").string()), 4) == good);
  for (const std::string bad :
       {"", "[]", "{", R"({"classes":["a"],"top5":[1]})", R"({"classes":["a"],"top5":[],"cells":[]})",
        R"({"classes":[1],"top5":[1],"cells":[]})", R"({"classes":["a"],"top5":[-1],"cells":[]})",
        R"({"classes":["a"],"top5":[1],"cells":[[0,1,1]]})", R"({"classes":["a"],"top5":[1],"cells":[[0,0,-1]]})",
        R"({"classes":["a"],"top5":[1],"cells":[[0,0,1.5]]})",
        R"({"classes":["a"],"top5":[1],"cells":[[0,0,9223372036854775807],[0,0,9]]})", R"({"classes":["a"],"top5":[1],"cells":[3]})"}) {
    INFO(bad);
    CHECK_THAT(error(bad), Contains("confusion.json: "));
  }
  CHECK(error_of([&] { read_confusion("/nowhere/confusion.json"); }) != "");
}

TEST_CASE("confusion: the picture has a dark cell where a class is taken for another, at any number of classes") {
  Confusion two(2);
  two.add({0, 0, 4}), two.add({1, 0, 1}), two.add({1, 1, 3});
  const Image image = draw_confusion(two);
  CHECK(image.channels == 3);
  // Row 0: all right. Row 1: a quarter wrong. Looked at beside the percentage in the cell's middle.
  const int left = 50, top = 38, cell = 44;
  CHECK(pixel(image, top + 3, left + 3) == std::array{8, 38, 94});
  CHECK(pixel(image, top + 3, left + cell + 3) == std::array{255, 255, 255});
  CHECK(pixel(image, top + cell + 3, left + 3) == std::array{66, 146, 198});
  const auto middle = pixel(image, top + cell + 3, left + cell + 3);
  CHECK(middle[0] > 8);
  CHECK(middle[0] < 66);
  for (const int classes : {1, 10, 100, 1000, 2500}) {
    INFO(classes);
    Confusion c(classes);
    c.add({classes - 1, 0, 10});
    const Image p = draw_confusion(c);
    CHECK(p.height < 1200);
    CHECK(p.width < 1200);
    CHECK(p.pixels.size() == static_cast<size_t>(p.height) * p.width * 3);
    int dark = 0, nothing = 0;
    for (size_t i = 0; i < p.pixels.size(); i += 3) {
      dark += p.pixels[i] == 8 && p.pixels[i + 1] == 38;
      nothing += p.pixels[i] == 225 && p.pixels[i + 1] == 228;
    }
    CHECK(dark > 0);
    CHECK((nothing > 0) == (classes > 1));  // rows without images
  }
}

TEST_CASE("best classes: in order, with probabilities, of whole test sets and of parts of ranks") {
  DataOptions options;
  options.kind = "shapes", options.train_size = 20, options.test_size = 20, options.image_size = 8;
  const auto test = open_datasets(options).test;
  const std::vector<std::string> names{"cat", "a \"dog\", wet"};
  const auto table = [&](const std::vector<std::vector<int64_t>>& ranks) {
    std::vector<double> all;
    std::string csv;
    for (size_t pass = 0; pass < 2; ++pass)  // the first finds what others have noted
      for (const std::vector<int64_t>& pictures : ranks) {
        BestClasses best(20, 3);
        std::vector<int64_t> labels;
        std::vector<float> logits;
        for (const int64_t i : pictures) {
          labels.push_back(kLabels[i]);
          logits.insert(logits.end(), kLogits.begin() + 3 * i, kLogits.begin() + 3 * i + 3);
        }
        best.take(batch_of(pictures, labels), Tensor::from<float>({static_cast<int64_t>(pictures.size()), 3}, logits));
        best.finish([&](std::vector<double>& notes) {
          if (pass == 1) {
            notes = all;
            return;
          }
          all.resize(notes.size());
          for (size_t i = 0; i < notes.size(); ++i) all[i] += notes[i];
        });
        csv = best.csv(*test, names);
      }
    return parse_csv(csv);
  };
  const auto rows = table({{0, 1, 2, 3, 5}});
  CHECK(rows == table({{2, 5}, {0, 1, 3}}));
  REQUIRE(rows.size() == 6);
  CHECK(rows[0] == std::vector<std::string>{"picture", "truth", "truth_name", "top1", "top1_name", "top1_probability", "top2", "top2_name",
                                            "top2_probability", "top3", "top3_name", "top3_probability"});
  const auto classes = [&](size_t row) { return std::vector<std::string>{rows[row][1], rows[row][3], rows[row][6], rows[row][9]}; };
  CHECK(classes(1) == std::vector<std::string>{"0", "0", "2", "1"});
  CHECK(classes(2) == std::vector<std::string>{"0", "1", "2", "0"});  // of two equals the lower class
  CHECK(classes(4) == std::vector<std::string>{"1", "0", "1", "2"});
  CHECK(classes(5) == std::vector<std::string>{"2", "", "", ""});  // NaN
  CHECK((rows[1][0] == test->describe(0) && rows[5][0] == test->describe(5)));
  CHECK((rows[1][4] == "cat" && rows[1][7] == "2" && rows[1][10] == "a \"dog\", wet"));
  const double e = std::exp(-1), sum = 1 + e + std::exp(-2);
  CHECK(std::stod(rows[1][5]) == Approx(1 / sum));
  CHECK(std::stod(rows[1][8]) == Approx(e / sum));
  CHECK(std::stod(rows[4][11]) == Approx(1.0 / 3));
}
