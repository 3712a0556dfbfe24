// Top-k counts at their edges, and an evaluation that is stopped.
#include "mesa/train/evaluate.h"

#include <catch2/catch.hpp>
#include <cmath>

#include "mesa/data/pixels.h"

using namespace mesa;

namespace {

Tensor logits_of(const std::vector<float>& row) { return Tensor::from<float>({1, static_cast<int64_t>(row.size())}, row); }
Tensor label(int64_t value) { return Tensor::from<int64_t>({1}, {value}); }

}  // namespace

TEST_CASE("evaluate: top-k with ties, NaN and labels out of range") {
  const Tensor rising = logits_of({1, 2, 3, 4, 5, 6});
  CHECK(count_top(rising, label(5), 1) == 1);
  CHECK(count_top(rising, label(1), 5) == 1);
  CHECK(count_top(rising, label(0), 5) == 0);
  const Tensor equal = logits_of({7, 7, 7});
  CHECK(count_top(equal, label(0), 1) == 1);  // a constant output must not look right for every class
  CHECK(count_top(equal, label(1), 1) == 0);
  CHECK(count_top(equal, label(1), 2) == 1);
  CHECK(count_top(logits_of({1, NAN, 0}), label(1), 3) == 0);
  CHECK(count_top(logits_of({NAN, NAN, NAN}), label(0), 1) == 0);
  CHECK_THROWS_AS(count_top(equal, label(3), 1), Error);
  CHECK_THROWS_AS(count_top(equal, label(-1), 1), Error);
}

TEST_CASE("evaluate: with mirror images logits are the mean over both, and a mirrored set gives the same") {
  const std::string text =
      "model: {name: vit, image_size: 16, patch_size: 8, width: 24, depth: 1, heads: 3, classes: 10}\n"
      "data: {kind: shapes, train_size: 32, test_size: 12, workers: 1, eval_flip: true}\ntrain: {batch_size: 5}\n";
  const RunConfig config = parse_config(text, "e.yaml");
  const NetConfig net = model_config(config, 10);
  BuiltModel model(config, net);
  TransformOptions transform = make_transform(config, net.input());
  REQUIRE(transform.eval_flip);
  const DatasetPair data = make_datasets(config, net.input());

  /// The test set with left and right exchanged.
  class Mirrored : public Dataset {
   public:
    explicit Mirrored(std::shared_ptr<const Dataset> of) : of_(std::move(of)) {}
    int64_t size() const override { return of_->size(); }
    int64_t classes() const override { return of_->classes(); }
    const std::vector<std::string>& class_names() const override { return of_->class_names(); }
    Sample get(int64_t index) const override {
      Sample sample = of_->get(index);
      pixels::mirror({sample.image.pixels.data(), sample.image.height, sample.image.width, sample.image.channels});
      return sample;
    }
    std::string describe(int64_t index) const override { return of_->describe(index); }

   private:
    std::shared_ptr<const Dataset> of_;
  };
  const auto logits = [&](const std::shared_ptr<const Dataset>& set, bool flip) {
    transform.eval_flip = flip;
    std::vector<double> all;
    Loader loader(set, transform, LoaderOptions::evaluation(5));
    evaluate(model, loader, transform, {}, {}, [&](const Batch&, const Tensor& x) {
      const auto values = x.to_vector<double>();
      all.insert(all.end(), values.begin(), values.end());
    });
    return all;
  };
  const auto mirrored = std::make_shared<Mirrored>(data.test);
  const auto once = logits(data.test, false), other = logits(mirrored, false), both = logits(data.test, true), swapped = logits(mirrored, true);
  REQUIRE(both.size() == 120);
  CHECK(once != other);
  for (size_t i = 0; i < both.size(); ++i) {
    CHECK(both[i] == Approx((once[i] + other[i]) / 2).margin(1e-6));
    CHECK(both[i] == swapped[i]);
  }
}

TEST_CASE("evaluate: the result does not depend on the batch size, and a stop is told") {
  const std::string text =
      "model: {name: vit, image_size: 16, patch_size: 8, width: 24, depth: 1, heads: 3, classes: 10}\n"
      "data: {kind: shapes, train_size: 32, test_size: 21, workers: 1}\ntrain: {batch_size: 7}\n";
  const RunConfig config = parse_config(text, "e.yaml");
  const NetConfig net = model_config(config, 10);
  BuiltModel model(config, net);
  const TransformOptions transform = make_transform(config, net.input());
  const DatasetPair data = make_datasets(config, net.input());
  std::vector<EvalResult> results;
  for (int64_t batch : {1, 7, 8, 21, 64}) {
    Loader loader(data.test, transform, LoaderOptions::evaluation(batch));
    results.push_back(evaluate(model, loader, transform));
    CHECK(results.back().complete);
    CHECK(results.back().images == 21);
    CHECK(results.back().top1 == results[0].top1);
    CHECK(results.back().top5 == results[0].top5);
    CHECK(results.back().loss == Approx(results[0].loss).epsilon(1e-6));
  }
  Loader loader(data.test, transform, LoaderOptions::evaluation(7));
  int asked = 0;
  const EvalResult stopped = evaluate(model, loader, transform, [&] { return ++asked > 2; });
  CHECK_FALSE(stopped.complete);
  CHECK(stopped.images == 14);
  CHECK(evaluate(model, loader, transform).images == 21);  // the loader starts over
}
