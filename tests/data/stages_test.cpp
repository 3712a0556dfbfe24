// Where the time of a picture goes.
#include "mesa/data/stages.h"

#include <catch2/catch.hpp>
#include <chrono>
#include <thread>

#include "mesa/data/loader.h"
#include "support/data_files.h"

using namespace mesa;
using namespace mesa::testing;

namespace {
void spin(int ms) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(ms);
  while (std::chrono::steady_clock::now() < end) {
  }
}
double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Reads for 6 ms and decodes for 3.
class Slow : public Dataset {
 public:
  int64_t size() const override { return 8; }
  int64_t classes() const override { return 1; }
  const std::vector<std::string>& class_names() const override { return names_; }
  std::string describe(int64_t) const override { return "slow"; }
  Sample get(int64_t) const override {
    {
      const StageScope reading(Stage::read);
      spin(6);
    }
    spin(3);
    return {test_image(8, 8, 3), 0};
  }

 private:
  std::vector<std::string> names_{"one"};
};
}  // namespace

TEST_CASE("stages: a stage inside another one interrupts it, and threads count apart", "[data][stages]") {
  const StageTimes before = stage_times();
  const auto start = std::chrono::steady_clock::now();
  {
    const StageScope decoding(Stage::decode);
    spin(2);
    {
      const StageScope reading(Stage::read);
      spin(8);
    }
    spin(2);
  }
  const double all = seconds_since(start);
  spin(20);
  std::thread([] {
    const StageScope augmenting(Stage::augment);
    spin(5);
    CHECK(stage_times().read == 0);
  }).join();
  const StageTimes spent = stage_times() - before;
  CHECK(spent.read >= 0.008);
  CHECK(spent.decode >= 0.004);
  CHECK(spent.read + spent.decode <= all);
  CHECK(spent.augment == 0);
}

TEST_CASE("stages: the loader sums them over its threads", "[data][stages]") {
  TransformOptions transform;
  transform.image_size = 8;
  for (int64_t workers : {1, 3}) {
    LoaderOptions options = LoaderOptions::evaluation(4);
    options.workers = workers;
    Loader loader(std::make_shared<Slow>(), transform, options);
    CHECK(loader.workers() == workers);
    const auto start = std::chrono::steady_clock::now();
    loader.start_epoch(0);
    while (loader.next()) {
    }
    const StageTimes times = loader.stage_times();
    CHECK(times.read >= 8 * 0.006);
    CHECK(times.decode >= 8 * 0.003);
    CHECK(times.augment > 0);
    CHECK(times.read + times.decode + times.augment <= seconds_since(start) * static_cast<double>(workers));
    loader.start_epoch(0);
    while (loader.next()) {
    }
    CHECK(loader.stage_times().read >= 16 * 0.006);
  }
}
