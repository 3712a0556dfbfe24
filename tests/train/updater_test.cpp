// One update: whatever batches it is made of, and of however many ranks, it is that of all their images at once.
#include "../../src/train/updater.h"

#include <catch2/catch.hpp>
#include <cstdio>
#include <cstdlib>
#include <numeric>

#include "mesa/train/optimizer_setup.h"
#include "support/mpirun.h"
#include "support/tiny_config.h"

using namespace mesa;
using namespace mesa::testing;

namespace {

/// Indices of pictures.
using Pictures = std::vector<int64_t>;

Pictures range(int64_t from, int64_t to) {
  Pictures out(static_cast<size_t>(to - from));
  std::iota(out.begin(), out.end(), from);
  return out;
}

Batch batch_of(const Dataset& data, const Pictures& pictures, const TransformOptions& transform) {
  const int64_t n = static_cast<int64_t>(pictures.size()), side = transform.image_size;
  Batch batch;
  batch.images = Tensor::empty({n, side, side, transform.channels}, DType::u8);
  batch.labels = Tensor::empty({n}, DType::i64);
  batch.sample_indices = pictures;
  for (int64_t i = 0; i < n; ++i) {
    const Dataset::Sample sample = data.get(pictures[static_cast<size_t>(i)]);
    transform_for_evaluation(sample.image, transform, batch.images.data<uint8_t>() + i * transform.bytes());
    batch.labels.data<int64_t>()[i] = sample.label;
  }
  return batch;
}

struct Made {
  double loss = 0, norm = 0, weights = 0;  // the last: of each a different multiple
  int64_t images = 0;
};

/// By this rank, of these batches; `full`: how large batches are said to be; `clip`: the norm to which gradients are reduced, 0 for none.
Made update(World& world, int64_t full, const std::vector<Pictures>& batches, double clip = 0) {
  RunConfig config = parse_config(kTinyTraining, "tiny.yaml",
                                  {concat("train.batch_size=", full), "optimizer.name=sgd", "optimizer.lr=0.1", "optimizer.weight_decay=0",
                                   "schedule.name=constant", "schedule.warmup_epochs=0", concat("train.clip_norm=", clip)});
  config.rank = world.me().rank, config.ranks = world.me().world;
  const NetConfig net = model_config(config, known_classes(config));
  const DatasetPair data = make_training_data(config, net.input());
  const TransformOptions transform = make_transform(config, net.input());
  BuiltModel model(config, net);
  StoragePolicy policy = make_policy(reference_storage());
  Team team(world, kCpu);
  const auto sync = share_gradients(config, model.params, team.communicator());
  const auto optimizer = make_optimizer(config, model.params, shard_of(sync.get(), team.communicator()));
  Updater updater(config, model, policy, sync.get(), *optimizer, nullptr, make_schedule(config, 1), transform, team, 0);
  TrainingState state;
  size_t next = 0;
  const UpdateResult result = updater(
      static_cast<int64_t>(batches.size()),
      [&] { return send(batch_of(*data.train, batches[next++], transform), net.input().classes, kCpu); }, [](const cuda::Mark&) {}, state);
  Made made{result.loss, result.gradient_norm, 0, result.images};
  int64_t place = 0;
  for (const Param& param : model.params.params())
    for (const double w : param.value.to_vector<double>()) made.weights += w * static_cast<double>(++place % 7 - 3);
  return made;
}

void check_same_update(const Made& a, const Made& b) {
  CHECK(a.images == b.images);
  CHECK(a.loss == Approx(b.loss).epsilon(1e-6));
  CHECK(a.norm == Approx(b.norm).epsilon(1e-5));
  CHECK(a.weights == Approx(b.weights).epsilon(1e-6));
}

}  // namespace

TEST_CASE("update: of accumulated batches that are not all full it is the mean over their images") {
  World alone(30);
  const Made whole = update(alone, 13, {range(0, 13)});
  for (const double clip : {0.0, 0.1}) {
    const Made at_once = update(alone, 13, {range(0, 13)}, clip);
    check_same_update(update(alone, 8, {range(0, 8), range(8, 13)}, clip), at_once);
    check_same_update(update(alone, 5, {range(0, 5), range(5, 10), range(10, 13)}, clip), at_once);
    CHECK((at_once.weights == whole.weights) == (clip == 0));
  }
  CHECK(whole.weights != Approx(update(alone, 8, {range(0, 8)}).weights).epsilon(1e-6));  // pictures tell
}

/// Run as one of two ranks by the test below.
TEST_CASE("rank: an uneven part", "[.rank]") {
  if (std::getenv("OMPI_COMM_WORLD_SIZE") == nullptr) return;
  World world(30);
  const Made made = update(world, 8, {world.leads() ? range(0, 8) : range(8, 13)});
  if (world.leads()) std::fprintf(stderr, "made %.17g %.17g %.17g %ld\n", made.loss, made.norm, made.weights, made.images);
}

TEST_CASE("update: of ranks with unequal parts it is the mean over all images", "[ranks]") {
  if (!has_mpirun()) return;
  const ProcessResult result = mpirun(2, "mesa-tests", {"rank: an uneven part"});
  INFO(result.out << result.err);
  REQUIRE(result.code == 0);
  const size_t at = result.err.find("made ");
  REQUIRE(at != std::string::npos);
  Made made;
  REQUIRE(std::sscanf(result.err.c_str() + at, "made %lf %lf %lf %ld", &made.loss, &made.norm, &made.weights, &made.images) == 4);
  World alone(30);
  check_same_update(made, update(alone, 13, {range(0, 13)}));
}
