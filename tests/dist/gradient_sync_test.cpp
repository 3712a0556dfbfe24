// Buckets of gradients: every gradient leaves once, in one order, as soon as its bucket is full.
#include "mesa/dist/gradient_sync.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <random>

#include "mesa/kernels/elementwise.h"
#include "mesa/nn/builder.h"
#include "support/random.h"

using namespace mesa;
using namespace mesa::testing;

namespace {

/// Notes what would be summed; "sums" over two ranks with the same gradients.
class Recorder : public Communicator {
 public:
  Recorder() : Communicator({0, 2, 0, "here"}) {}
  void all_reduce(const Tensor& x) override {
    begun.push_back(x);
    kernels::scale(x, 2, x);
  }
  void reduce_scatter(const Tensor&, const Tensor&) override {}
  void all_gather(const Tensor&, const Tensor&) override {}
  void broadcast(const Tensor&, int64_t) override {}
  void finish() override {}
  std::vector<Tensor> begun;
};

struct Model {
  ParamStore store;
  explicit Model(const std::vector<int64_t>& sizes, const std::vector<size_t>& frozen = {}) {
    const Builder build(store, 1);
    for (size_t i = 0; i < sizes.size(); ++i) build.param(concat("p", i), {sizes[i]}, Init::zeros(), true);
    for (const size_t i : frozen) store.params()[i].trainable = false;
    store.allocate_gradients();
    for (Param& p : store.params())
      if (p.trainable) kernels::fill(p.grad, 3);
  }
};

}  // namespace

TEST_CASE("gradients: whatever the order in which they are ready, each is summed once and buckets leave in one order", "[dist]") {
  INFO(seed_note());
  std::mt19937 random(static_cast<uint32_t>(test_seed()));
  for (int round = 0; round < 20; ++round) {
    std::vector<int64_t> sizes;
    for (int i = 0; i < 12; ++i) sizes.push_back(1 + static_cast<int64_t>(random() % 200));
    Model model(sizes, {3, 11});
    Recorder recorder;
    GradientSync sync(recorder, model.store.params(), 600);  // bytes
    CHECK(sync.buckets() > 2);
    std::vector<Param*> order;
    for (Param& p : model.store.params())
      if (p.trainable) order.push_back(&p);
    std::shuffle(order.begin(), order.end(), random);
    sync.begin();
    for (const Param* p : order) sync.ready(*p);
    CHECK(static_cast<int64_t>(recorder.begun.size()) == sync.buckets());  // all were full before the end
    sync.finish();
    for (Param& p : model.store.params())
      if (p.trainable)
        for (const double g : p.grad.to_vector<double>()) CHECK(g == 6);
    for (size_t i = 1; i < recorder.begun.size(); ++i) CHECK(recorder.begun[i].offset() > recorder.begun[i - 1].offset());
  }
}

TEST_CASE("gradients: one that never comes leaves at the end, and the last bucket is small", "[dist]") {
  constexpr int64_t kMegabyte = 1 << 18;  // elements of f32
  Model model({1000, kMegabyte / 2, 4 * kMegabyte, 4 * kMegabyte, 4 * kMegabyte});
  Recorder recorder;
  GradientSync sync(recorder, model.store.params());
  sync.begin();
  for (size_t i = 5; i-- > 1;) sync.ready(model.store.params()[i]);  // not the first parameter
  const size_t before = recorder.begun.size();
  CHECK(before == 2);  // 8 MB, and 4 MB
  sync.finish();
  REQUIRE(recorder.begun.size() == before + 1);
  CHECK(recorder.begun.back().bytes() <= GradientSync::kLastBucketBytes);
  CHECK(model.store.params()[0].grad.to_vector<double>()[0] == 6);
  sync.begin();  // and once more
  sync.finish();
  CHECK(recorder.begun.size() == 2 * before + 2);
}
