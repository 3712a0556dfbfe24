// An update that ends in an exception that is not Mesa's own, such as the system's of too little memory: it counts as if it never was.
#include <catch2/catch.hpp>
#include <filesystem>
#include <new>

#include "mesa/storage/codec.h"
#include "mesa/train/safetensors.h"
#include "mesa/train/trainer.h"
#include "support/data_files.h"
#include "support/tiny_config.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;
namespace fs = std::filesystem;

namespace {

/// int8 with running ranges, for which there is suddenly no memory.
class Starved : public Codec {
 public:
  inline static int64_t packs_left = 0;  // of all sites

  Packed pack(const Tensor& x, const PackContext& context) override {
    if (--packs_left < 0) throw std::bad_alloc();
    return inner_->pack(x, context);
  }
  Tensor unpack(const Packed& packed) const override { return inner_->unpack(packed); }
  int64_t packed_bytes(const Shape& shape, DType dtype, const Site& site) const override {
    return inner_->packed_bytes(shape, dtype, site);
  }
  double error_bound(double lo, double hi) const override { return inner_->error_bound(lo, hi); }
  std::map<std::string, Tensor> state() const override { return inner_->state(); }
  void load_state(const std::map<std::string, Tensor>& state) override { inner_->load_state(state); }
  void commit() override { inner_->commit(); }
  void roll_back() override { inner_->roll_back(); }
  uint64_t phase() const override { return inner_->phase(); }
  void repeat() override { inner_->repeat(); }

 private:
  std::unique_ptr<Codec> inner_ = make_codec("int8", {{"groups", "heads"}, {"range", "running"}});
};

/// A ResNet, which has running statistics besides; two batches an update.
struct StarvedRun {
  TemporaryFolder folder;
  StarvedRun() {
    static const bool once = [] {
      register_codec("starved", {}, [](const CodecOptions&) -> std::unique_ptr<Codec> { return std::make_unique<Starved>(); });
      return true;
    }();
    static_cast<void>(once);
  }
  int run(const std::string& output, int64_t packs, const std::vector<std::string>& sets = {}) const {
    const char* const text =
        "model: {name: resnet18, image_size: 24, width: 8, depths: [1, 1]}\n"
        "data: {kind: shapes, train_size: 96, test_size: 32, workers: 1}\n"
        "train: {epochs: 1, batch_size: 8, accumulation: 2, log_interval: 1, threads: 1}\n"
        "schedule: {name: constant}\n"  // so that a run of fewer steps makes the same
        "storage: [{match: \"*\", codec: starved}, {match: \"conv1:x\", codec: exact}]\n";
    RunConfig config = parse_config(text, "starved.yaml", sets);
    config.output = (folder.path() / output).string();
    Starved::packs_left = packs;
    return train(config, {"", true});
  }
  /// Weights, running statistics, moments and ranges.
  std::string state(const std::string& output) const {
    std::string out;
    for (const char* file : {"model", "state"}) {
      const std::string path = (folder.path() / output / "checkpoints" / "last" / file).string() + ".safetensors";
      for (const NamedTensor& tensor : read_safetensors(path).tensors) {
        out += tensor.name;
        for (const double value : tensor.tensor.to_vector<double>()) out += concat(" ", value);
        out += "\n";
      }
    }
    return out;
  }
};

}  // namespace

TEST_CASE("trainer: an update that ends in an exception of the system's leaves no trace") {
  const StarvedRun t;
  constexpr int64_t kPlenty = 1 << 20;
  REQUIRE(t.run("two", kPlenty, {"train.steps=2"}) == 0);
  const int64_t packs = (kPlenty - Starved::packs_left) / 4;  // of a batch
  REQUIRE(packs > 3);
  const std::string expected = t.state("two");
  CHECK_THAT(expected, Contains("running_mean") && Contains("/alpha"));
  for (const int64_t more : {int64_t{1}, packs + 1, 2 * packs - 1}) {  // within the first batch of the third update, and within the second
    CAPTURE(more, packs);
    const std::string output = concat("failed", more);
    CHECK_THAT(error_of([&] { t.run(output, 4 * packs + more); }), Contains("bad_alloc") && Contains("at epoch 1, step 2"));
    CHECK(t.state(output) == expected);
  }
}
