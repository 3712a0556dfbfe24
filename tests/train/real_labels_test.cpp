// ReaL labels: timm's rule for ImageNet's list, maps by name, several right classes, and files that cannot be used.
#include "mesa/train/real_labels.h"

#include <catch2/catch.hpp>

#include "support/data_files.h"
#include "support/errors.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

namespace {

/// Pictures that have nothing but places.
class Named : public Dataset {
 public:
  explicit Named(std::vector<std::string> places) : places_(std::move(places)) {}
  int64_t size() const override { return static_cast<int64_t>(places_.size()); }
  int64_t classes() const override { return 10; }
  const std::vector<std::string>& class_names() const override { return places_; }
  Sample get(int64_t) const override { return {}; }
  std::string describe(int64_t index) const override { return places_.at(static_cast<size_t>(index)); }

 private:
  std::vector<std::string> places_;
};

const Named kImageNet({"/d/val/n02/ILSVRC2012_val_00000003.JPEG", "val.tar: ILSVRC2012_val_00000001", "/d/ILSVRC2012_val_00000004.png",
                       "x/ILSVRC2012_val_00000002.JPEG"});

struct File {
  TemporaryFolder folder;
  std::string path;
  explicit File(const std::string& text) : path((folder.path() / "real.json").string()) {
    folder.write("real.json", {text.begin(), text.end()});
  }
};

std::string problem(const std::string& text, const Dataset& data = kImageNet) {
  const File file(text);
  return error_of([&] { RealLabels(file.path, data, 10); });
}

Batch batch_of(const std::vector<int64_t>& indices) {
  Batch batch;
  batch.sample_indices = indices;
  return batch;
}

/// A row whose best classes are those of `order`, best first.
std::vector<float> row_of(const std::vector<int>& order) {
  std::vector<float> row(10, 0);
  for (size_t i = 0; i < order.size(); ++i) row[static_cast<size_t>(order[i])] = 10 - static_cast<float>(i);
  return row;
}

Tensor rows(const std::vector<std::vector<int>>& orders) {
  std::vector<float> all;
  for (const auto& order : orders)
    for (const float x : row_of(order)) all.push_back(x);
  return Tensor::from<float>({static_cast<int64_t>(orders.size()), 10}, all);
}

}  // namespace

TEST_CASE("ReaL: names of ImageNet give the entry, any of its classes is right, and empty ones are left out") {
  // By number of the picture's name: 1 -> [7], 2 -> [], 3 -> [1, 2], 4 -> [9].
  const File file("[[7], [], [1, 2], [9]]");
  RealLabels real(file.path, kImageNet, 10);
  real.take(batch_of({0, 1}), rows({{2, 5, 6, 7, 8}, {0, 1, 2, 3, 7}}));  // 3: right; 1: among the best five
  real.take(batch_of({2, 3}), rows({{0, 1, 2, 3, 4}, {0, 1, 2, 3, 4}}));  // 4: wrong; 2: not counted
  const RealResult result = real.finish();
  CHECK(result.images == 3);
  CHECK(result.unlabelled == 1);
  CHECK(result.top1 == Approx(100.0 / 3));
  CHECK(result.top5 == Approx(200.0 / 3));
  CHECK(real.finish().images == 0);
  // Of several ranks.
  real.take(batch_of({0}), rows({{1}}));
  CHECK(real.finish([](std::vector<double>& sums) { sums[0] += 2, sums[1] += 2, sums[2] += 3; }).top1 == Approx(75));
}

TEST_CASE("ReaL: an object names pictures with or without folder and ending") {
  const Named data({"/d/val/cat/1.png", "/d/val/dog/1.png", "shard-0.tar: b/2", "test_batch.bin: record 17", "/d/val/dog/3.jpeg"});
  const File file(R"({"cat/1.png": [1], "dog/1": [2], "2": [3], "record 17": [4, 5], "3.jpeg": [], "other": [6]})");
  RealLabels real(file.path, data, 10);
  real.take(batch_of({0, 1, 2, 3, 4}), rows({{1}, {2}, {3}, {5}, {6}}));
  const RealResult result = real.finish();
  CHECK(result.top1 == 100);
  CHECK(result.images == 4);
  CHECK(result.unlabelled == 1);
  CHECK_THAT(problem(R"({"1.png": [1], "2": [1], "record 17": [1], "3": [1]})", data),
             Contains("entry '1.png' would stand for two pictures, /d/val/cat/1.png and /d/val/dog/1.png"));
  CHECK_THAT(problem(R"({"cat/1.png": [1], "dog/1": [2], "2": [3]})", data), Contains("has no entry 'record 17'"));
  CHECK_THAT(problem("[[1], [1], [1], [1], [1]]", data),
             Contains("is a list for the pictures ILSVRC2012_val_00000001 and on, and /d/val/cat/1.png is none of them"));
}

TEST_CASE("ReaL: a bad file is refused with its name, the entry and the reason") {
  CHECK_THAT(problem("[[1], [1], [1]]"), Contains("real.json: has 3 entries, none for /d/ILSVRC2012_val_00000004.png"));
  CHECK_THAT(problem("[[1], [1], [10], [1]]"),
             Contains("entry 2 (ILSVRC2012_val_00000003.JPEG) has class 10, but the model has classes 0 to 9"));
  CHECK_THAT(problem("[[1], [1], [-1], [1]]"), Contains("has class -1"));
  CHECK_THAT(problem("[[1], [1], [18446744073709551615], [1]]"), Contains("has class 18446744073709551615"));
  CHECK_THAT(problem("[[1], [1], [1.5], [1]]"), Contains("holds 1.5, which is no class number"));
  CHECK_THAT(problem("[[1], [1], 5, [1]]"), Contains("is no list of classes"));
  CHECK_THAT(problem("[[1], [1]"), Contains("real.json: is not valid JSON"));
  CHECK_THAT(problem("7"), Contains("neither a list"));
  CHECK_THAT(problem("[[[[[]]]]]"), Contains("nested deeper"));
  CHECK_THAT(problem(std::string(100000, '[')), Contains("nested deeper"));
  CHECK_THAT(problem("[[1],[1],[1],[1]]", Named({"/d/ILSVRC2012_val_0000000A.JPEG"})), Contains("is none of them"));
  CHECK_THAT(problem("[[1],[1],[1],[1]]", Named({"/d/ILSVRC2012_val_00000000.JPEG"})), Contains("is none of them"));
  CHECK_THAT(error_of([] { RealLabels("/nowhere/real.json", kImageNet, 10); }), Contains("/nowhere/real.json"));
}
