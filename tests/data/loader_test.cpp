// The loader: one order whatever the threads, exact resume in mid-epoch, replacements of damaged pictures, and an orderly end.
#include "mesa/data/loader.h"

#include <signal.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <chrono>
#include <mutex>
#include <set>
#include <thread>

#include "mesa/train/safetensors.h"
#include "support/data_files.h"
#include "support/paths.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Contains;

namespace {
/// Pictures that tell their number, some of them damaged, some slow.
class Numbers : public Dataset {
 public:
  explicit Numbers(int64_t size, std::set<int64_t> bad = {}, int delay_ms = 0) : size_(size), bad_(std::move(bad)), delay_ms_(delay_ms) {}
  int64_t size() const override { return size_; }
  int64_t classes() const override { return 10; }
  const std::vector<std::string>& class_names() const override { return names_; }
  Sample get(int64_t index) const override {
    if (delay_ms_ > 0) std::this_thread::sleep_for(std::chrono::milliseconds(delay_ms_));
    {
      const std::lock_guard lock(mutex_);
      asked_.insert(index);
      sigset_t blocked;
      pthread_sigmask(SIG_BLOCK, nullptr, &blocked);
      signals_blocked_ = signals_blocked_ && sigismember(&blocked, SIGTERM) == 1 && sigismember(&blocked, SIGINT) == 1;
    }
    check(bad_.count(index) == 0, describe(index), ": is damaged");
    return {test_image(8 + static_cast<int>(index % 3), 8, 3), index % 10};
  }
  std::string describe(int64_t index) const override { return concat("number ", index); }
  bool signals_blocked() const { return signals_blocked_; }
  std::set<int64_t> asked() const {
    const std::lock_guard lock(mutex_);
    return asked_;
  }

 private:
  int64_t size_;
  std::set<int64_t> bad_;
  int delay_ms_;
  std::vector<std::string> names_ = std::vector<std::string>(10, "digit");
  mutable std::mutex mutex_;
  mutable std::set<int64_t> asked_;
  mutable bool signals_blocked_ = true;
};

TransformOptions augmented() {
  TransformOptions transform;
  transform.image_size = 8;
  transform.crop = Crop::resized;
  transform.augment = parse_augment("rand-m9-mstd0.5-inc1", "augment");
  transform.augment.color_jitter = true;
  transform.color_jitter = 0.3;
  transform.erasing.probability = 0.25;
  return transform;
}

LoaderOptions batches_of(int64_t size, int64_t workers = 1) {
  LoaderOptions options;
  options.batch_size = size;
  options.workers = workers;
  options.seed = 11;
  return options;
}

struct Record {
  std::vector<int64_t> samples, labels;
  Bytes pixels;
  bool operator==(const Record&) const = default;
};

std::vector<Record> read_epoch(Loader& loader, int64_t epoch, int64_t first_batch = 0) {
  std::vector<Record> records;
  loader.start_epoch(epoch, first_batch);
  while (auto batch = loader.next()) {
    CHECK(batch->index == first_batch + static_cast<int64_t>(records.size()));
    CHECK(batch->epoch == epoch);
    CHECK(batch->images.shape() == Shape{batch->labels.dim(0), 8, 8, 3});
    records.push_back({batch->sample_indices, batch->labels.to_vector<int64_t>(), batch->images.to_vector<uint8_t>()});
  }
  return records;
}
}  // namespace

TEST_CASE("the mixing of a batch depends on its number, not on the workers, and stays while the batch is held", "[data]") {
  const auto numbers = std::make_shared<Numbers>(103);
  const auto mixings = [&](LoaderOptions options, int64_t first_batch) {
    options.mix.mixup = 0.8, options.mix.cutmix = 1, options.mix.mode = MixMode::elem;
    Loader loader(numbers, augmented(), options);
    std::vector<Batch> held;
    loader.start_epoch(1, first_batch);
    while (auto batch = loader.next()) held.push_back(std::move(*batch));
    std::vector<std::vector<float>> out;
    for (const Batch& batch : held) out.push_back(batch.mixing.to_vector<float>());
    return out;
  };
  const auto all = mixings(batches_of(10), 0);
  REQUIRE(all.size() == 10);
  CHECK(all[0] != all[1]);
  CHECK(mixings(batches_of(10, 4), 0) == all);
  CHECK(mixings(batches_of(10), 7) == std::vector(all.begin() + 7, all.end()));
  Loader plain(numbers, augmented(), batches_of(10));
  plain.start_epoch(0);
  CHECK_FALSE(plain.next()->mixing.defined());
  LoaderOptions odd = batches_of(7);
  odd.mix.mixup = 1;
  CHECK_THROWS_WITH(Loader(numbers, augmented(), odd), Contains("even size") && Contains("7"));
}

TEST_CASE("order and pixels depend on the seed and the epoch, not on the workers", "[data]") {
  const auto numbers = std::make_shared<Numbers>(103);
  Loader reference(numbers, augmented(), batches_of(10));
  const auto first = read_epoch(reference, 0), second = read_epoch(reference, 1);
  CHECK(first.size() == 10);
  CHECK(first != second);
  for (int64_t workers : {1, 2, 4})
    for (int64_t prefetch : {1, 3}) {
      LoaderOptions options = batches_of(10, workers);
      options.prefetch = prefetch;
      Loader loader(numbers, augmented(), options);
      CHECK(read_epoch(loader, 0) == first);
      CHECK(read_epoch(loader, 1) == second);
      CHECK(read_epoch(loader, 0) == first);
    }
  LoaderOptions other = batches_of(10);
  other.seed = 12;
  Loader loader(numbers, augmented(), other);
  CHECK(read_epoch(loader, 0) != first);
  CHECK(numbers->signals_blocked());
}

TEST_CASE("an epoch is a permutation", "[data]") {
  Loader loader(std::make_shared<Numbers>(60), augmented(), batches_of(6, 2));
  std::vector<int64_t> all;
  for (const auto& record : read_epoch(loader, 4)) all.insert(all.end(), record.samples.begin(), record.samples.end());
  CHECK(!std::is_sorted(all.begin(), all.end()));
  std::sort(all.begin(), all.end());
  for (int64_t i = 0; i < 60; ++i) CHECK(all[i] == i);
}

TEST_CASE("an epoch resumed in its middle goes on as if it had not stopped", "[data]") {
  const auto numbers = std::make_shared<Numbers>(50), fresh = std::make_shared<Numbers>(50);
  Loader whole(numbers, augmented(), batches_of(5, 2)), resumed(fresh, augmented(), batches_of(5, 2));
  auto records = read_epoch(whole, 3);
  records.erase(records.begin(), records.begin() + 7);
  CHECK(read_epoch(resumed, 3, 7) == records);
  CHECK(fresh->asked().size() == 15);  // skipped batches were not decoded
  CHECK(read_epoch(resumed, 3, 10).empty());
  whole.start_epoch(2);
  whole.next();
  CHECK(read_epoch(whole, 3, 7) == records);  // also after an epoch that was left half-way
}

TEST_CASE("evaluation goes through everything in order, the last batch partial", "[data]") {
  Loader loader(std::make_shared<Numbers>(23), augmented(), LoaderOptions::evaluation(10));
  CHECK(loader.batches_per_epoch() == 3);
  const auto records = read_epoch(loader, 0);
  REQUIRE(records.size() == 3);
  CHECK(records[2].samples == std::vector<int64_t>{20, 21, 22});
  CHECK(records[2].labels == std::vector<int64_t>{0, 1, 2});
  CHECK(read_epoch(loader, 1) == records);
  Loader large(std::make_shared<Numbers>(3), augmented(), LoaderOptions::evaluation(10));
  CHECK(read_epoch(large, 0).size() == 1);
}

TEST_CASE("ranks share each global batch", "[data]") {
  const auto numbers = std::make_shared<Numbers>(40);
  Loader one(numbers, augmented(), batches_of(8));
  LoaderOptions options = batches_of(4);
  options.world_size = 2;
  Loader front(numbers, augmented(), options);
  options.rank = 1;
  Loader back(numbers, augmented(), options);
  const auto all = read_epoch(one, 0), a = read_epoch(front, 0), b = read_epoch(back, 0);
  REQUIRE(a.size() == all.size());
  for (size_t i = 0; i < all.size(); ++i)
    for (size_t k = 0; k < 4; ++k) {
      CHECK(a[i].samples[k] == all[i].samples[k]);
      CHECK(b[i].samples[k] == all[i].samples[4 + k]);
    }
}

TEST_CASE("repeated pictures come in turns, each augmented anew and beside another, and an epoch stays as long", "[data][augment]") {
  const auto numbers = std::make_shared<Numbers>(40);
  LoaderOptions options = batches_of(8);
  Loader once(numbers, augmented(), options);
  options.repeats = 3;
  Loader thrice(numbers, augmented(), options);
  const auto single = read_epoch(once, 2), repeated = read_epoch(thrice, 2);
  REQUIRE(repeated.size() == single.size());
  std::vector<int64_t> order, seen;
  std::vector<Bytes> first, pictures;
  const auto pixels_of = [](const Record& record, size_t k) { return Bytes(&record.pixels[k * 192], &record.pixels[k * 192] + 192); };
  for (size_t b = 0; b < single.size(); ++b)
    for (size_t k = 0; k < 8; ++k) {
      order.push_back(single[b].samples[k]);
      first.push_back(pixels_of(single[b], k));
      seen.push_back(repeated[b].samples[k]);
      pictures.push_back(pixels_of(repeated[b], k));
      CHECK(repeated[b].labels[k] == seen.back() % 10);
    }
  for (size_t i = 0; i < seen.size(); ++i) {
    const size_t group = i / 18 * 6, turn = i / 6 % 3, in_turn = i % 6;
    CHECK(seen[i] == order[group + (in_turn % 2 == 0 ? in_turn : (in_turn + 2 * turn) % 6)]);
    if (turn == 0) CHECK(pictures[i] == first[group + in_turn]);  // the first appearance is the one without repeats
    for (size_t k = 0; k < i; ++k)
      if (seen[k] == seen[i]) CHECK(pictures[k] != pictures[i]);
    for (size_t k = i % 2; k + 1 < i; k += 2) CHECK((seen[k] != seen[i] || seen[k ^ 1] != seen[i ^ 1]));  // no pair comes twice
  }
}

TEST_CASE("repeats do not depend on ranks or workers and resume in mid-epoch", "[data][augment]") {
  const auto numbers = std::make_shared<Numbers>(60);
  LoaderOptions options = batches_of(12);
  options.repeats = 3;
  Loader one(numbers, augmented(), options);
  const auto all = read_epoch(one, 1);
  for (int64_t world : {2, 3, 4}) {
    options = batches_of(12 / world, 3);
    options.repeats = 3;
    options.world_size = world;
    for (int64_t rank = 0; rank < world; ++rank) {
      options.rank = rank;
      Loader part(numbers, augmented(), options);
      const auto mine = read_epoch(part, 1);
      REQUIRE(mine.size() == all.size());
      for (size_t b = 0; b < all.size(); ++b)
        for (size_t k = 0; k < mine[b].samples.size(); ++k) {
          const size_t at = static_cast<size_t>(rank) * mine[b].samples.size() + k;
          CHECK(mine[b].samples[k] == all[b].samples[at]);
          CHECK(std::equal(&mine[b].pixels[k * 192], &mine[b].pixels[k * 192] + 192, &all[b].pixels[at * 192]));
        }
    }
  }
  options = batches_of(12, 2);
  options.repeats = 3;
  Loader resumed(numbers, augmented(), options);
  CHECK(read_epoch(resumed, 1, 2) == std::vector<Record>(all.begin() + 2, all.end()));
}

TEST_CASE("a damaged picture stops the run by name, or is replaced, counted and listed", "[data]") {
  const auto numbers = std::make_shared<Numbers>(30, std::set<int64_t>{4, 5, 29});
  Loader strict(numbers, augmented(), LoaderOptions::evaluation(10));
  const std::string error = error_of([&] { read_epoch(strict, 0); });
  CHECK_THAT(error, Contains("number 4: is damaged") && Contains("data.on_bad_sample: skip"));
  CHECK(error_of([&] { strict.next(); }) == error);
  for (int64_t workers : {1, 3}) {
    LoaderOptions options = LoaderOptions::evaluation(10);
    options.workers = workers;
    options.on_bad_sample = OnBadSample::skip;
    Loader loader(numbers, augmented(), options);
    const auto records = read_epoch(loader, 0);
    CHECK(records[0].samples == std::vector<int64_t>{0, 1, 2, 3, 6, 6, 6, 7, 8, 9});
    CHECK(records[2].samples.back() == 0);  // round the end
    CHECK(loader.skipped() == 4);           // 4, 5, 5, 29
    REQUIRE(loader.skipped_samples().size() == 3);
    CHECK_THAT(loader.skipped_samples()[0], Contains("number 4: is damaged"));
    CHECK_THAT(loader.skipped_samples()[2], Contains("number 29"));
  }
}

TEST_CASE("twenty damaged pictures in a row are an error even when skipping", "[data]") {
  std::set<int64_t> bad;
  for (int64_t i = 10; i < 30; ++i) bad.insert(i);
  LoaderOptions options = LoaderOptions::evaluation(5);
  options.on_bad_sample = OnBadSample::skip;
  Loader loader(std::make_shared<Numbers>(40, bad), augmented(), options);
  CHECK_THAT(error_of([&] { read_epoch(loader, 0); }), Contains("20 damaged pictures in a row") && Contains("number 10"));
  bad.erase(29);
  Loader enough(std::make_shared<Numbers>(40, bad), augmented(), options);
  CHECK(read_epoch(enough, 0).size() == 8);
}

TEST_CASE("impossible loader options are refused", "[data]") {
  const auto numbers = std::make_shared<Numbers>(9);
  const auto error_with = [&](auto change) {
    LoaderOptions options = batches_of(3);
    change(options);
    return error_of([&] { Loader loader(numbers, augmented(), options); });
  };
  CHECK(error_with([](auto&) {}) == "");
  CHECK_THAT(error_with([](auto& o) { o.batch_size = 10; }), Contains("a batch of 10") && Contains("data set of 9"));
  CHECK_THAT(error_with([](auto& o) { o.batch_size = 0; }), Contains("batch size"));
  CHECK_THAT(error_with([](auto& o) { o.workers = -1; }), Contains("workers"));
  CHECK_THAT(error_with([](auto& o) { o.prefetch = 0; }), Contains("prefetch"));
  CHECK_THAT(error_with([](auto& o) { o.repeats = 0; }), Contains("repeats is 0"));
  CHECK_THAT(error_with([](auto& o) { o.rank = 1; }), Contains("rank 1 of 1"));
  CHECK_THAT(error_of([&] { Loader(std::make_shared<Numbers>(0), augmented(), batches_of(1)); }), Contains("empty"));
  Loader loader(numbers, augmented(), batches_of(3));
  CHECK_THAT(error_of([&] { loader.next(); }), Contains("start_epoch"));
  CHECK_THAT(error_of([&] { loader.start_epoch(0, 4); }), Contains("batch 4 of 3"));
  CHECK_THAT(error_of([] { parse_on_bad_sample("ignore", "data.on_bad_sample"); }), Contains("data.on_bad_sample"));
}

TEST_CASE("waiting for slow data is measured, and the end does not wait for the epoch", "[data]") {
  const auto before = std::chrono::steady_clock::now();
  {
    Loader loader(std::make_shared<Numbers>(10'000, std::set<int64_t>{}, 50), augmented(), batches_of(4));
    loader.start_epoch(0);
    for (int i = 0; i < 100 && loader.wait_seconds() < 0.01; ++i) loader.next();  // a busy machine may have been late itself
    CHECK(loader.wait_seconds() >= 0.01);
  }
  CHECK(std::chrono::steady_clock::now() - before < std::chrono::seconds(60));  // of minutes
}

TEST_CASE("batches are recycled without new memory, and kept ones stay as they are", "[data]") {
  Loader loader(std::make_shared<Numbers>(400), augmented(), batches_of(4, 2));
  loader.start_epoch(0);
  const MemoryUse start = Allocator::of(kCpu).use();
  for (int i = 0; i < 80; ++i) loader.next();
  const MemoryUse end = Allocator::of(kCpu).use();
  CHECK(end.of(MemoryKind::inputs) == start.of(MemoryKind::inputs));
  CHECK(end.system_allocations == start.system_allocations);
  loader.start_epoch(1);
  std::vector<Batch> kept;
  std::vector<Bytes> copies;
  while (auto batch = loader.next()) {
    copies.push_back(batch->images.to_vector<uint8_t>());
    kept.push_back(std::move(*batch));
  }
  for (size_t i = 0; i < kept.size(); ++i) CHECK(kept[i].images.to_vector<uint8_t>() == copies[i]);
}
