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
  explicit Recorder(int64_t rank = 0, int64_t ranks = 2) : Communicator({rank, ranks, 0, "here"}) {}
  void all_reduce(const Tensor& x) override {
    begun.push_back(x);
    kernels::scale(x, 2, x);
  }
  void reduce_scatter(const Tensor& x, const Tensor& part) override {
    CHECK(part.raw() == x.narrow(0, rank() * part.numel(), part.numel()).raw());
    CHECK(part.numel() * size() == x.numel());
    begun.push_back(x);
    kernels::scale(part, 2, part);
  }
  /// As if the other ranks' parts were 1, 2, ...
  void all_gather(const Tensor& part, const Tensor& x) override {
    ++gathered;
    const Tensor own = to(part, kCpu);
    const std::vector<float> mine = own.to_vector<float>();
    for (int64_t r = 0; r < size(); ++r) kernels::fill(x.narrow(0, r * part.numel(), part.numel()), static_cast<double>(r + 1));
    if (part.buffer() == x.buffer()) transfer(Tensor::from<float>({part.numel()}, mine), part);
  }
  void will_use(const Tensor& x) override { announced.push_back(x); }
  void broadcast(const Tensor&, int64_t) override {}
  void finish() override {}
  std::vector<Tensor> begun, announced;
  int64_t gathered = 0;
};

struct Model {
  ParamStore store;
  explicit Model(const std::vector<int64_t>& sizes, const std::vector<size_t>& frozen = {}, int64_t parts = 1) {
    const Builder build(store, 1);
    for (size_t i = 0; i < sizes.size(); ++i) build.param(concat("p", i), {sizes[i]}, Init::zeros(), true);
    for (const size_t i : frozen) store.params()[i].trainable = false;
    if (parts > 1) store.gather_values(parts);
    store.allocate_gradients(parts);
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
    for (int i = 0; i < 12; ++i) sizes.push_back(i % 4 == 0 ? 200 : 1 + static_cast<int64_t>(random() % 200));  // three fill a bucket each
    Model model(sizes, {3, 11});
    Recorder recorder;
    GradientSync sync(recorder, model.store.params(), {600});  // bytes
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
  CHECK(recorder.begun.back().bytes() <= kLastBucketBytes);
  CHECK(model.store.params()[0].grad.to_vector<double>()[0] == 6);
  sync.begin();  // and once more
  sync.finish();
  CHECK(recorder.begun.size() == 2 * before + 2);
}

TEST_CASE("gradients: shared by 2 to 5 ranks, each sum is needed by one of them and every part begins on 16 bytes", "[dist]") {
  INFO(seed_note());
  std::mt19937 random(static_cast<uint32_t>(test_seed()));
  for (const int64_t ranks : {2, 3, 4, 5}) {
    std::vector<int64_t> sizes;
    for (int i = 0; i < 12; ++i) sizes.push_back(i % 4 == 0 ? 200 : 1 + static_cast<int64_t>(random() % 200));  // three fill a bucket each
    Model model(sizes, {3, 11}, ranks);
    std::vector<int> owners(100'000, 0);  // of each element of the arena
    int64_t buckets = 0;
    for (int64_t rank = 0; rank < ranks; ++rank) {
      Recorder recorder(rank, ranks);
      GradientSync sync(recorder, model.store.params(), {600, DType::f32, true});
      buckets = sync.buckets();
      CHECK(buckets > 2);
      CHECK(recorder.announced.size() == 2);  // gradients and values
      for (const ArenaRange& part : sync.own()) {
        CHECK(part.begin % 4 == 0);
        for (int64_t i = part.begin; i < part.end; ++i) ++owners[static_cast<size_t>(i)];
      }
      sync.begin();
      sync.finish();
      CHECK(static_cast<int64_t>(recorder.begun.size()) == buckets);
    }
    for (const Param& p : model.store.params()) {
      if (!p.trainable) continue;
      CHECK(p.value.offset() == p.grad.offset());
      for (const double g : p.grad.to_vector<double>()) CHECK(g == 6);  // each part was doubled by its owner, once
      for (int64_t i = 0; i < p.grad.numel(); ++i) CHECK(owners[static_cast<size_t>(p.grad.offset() + i)] == 1);
    }
    for (const int count : owners) CHECK(count <= 1);
  }
}

TEST_CASE("gradients: values and states of all parts are put together in the parameters' own shapes", "[dist]") {
  Model model({40, 7, 90}, {}, 2);
  Recorder recorder(1, 2);
  GradientSync sync(recorder, model.store.params(), {100, DType::f32, true});
  for (Param& p : model.store.params()) kernels::fill(p.value, 9);
  sync.share_values();
  const std::vector<ArenaRange> own = sync.own();
  const auto is_mine = [&](int64_t at) {
    return std::any_of(own.begin(), own.end(), [&](const ArenaRange& part) { return at >= part.begin && at < part.end; });
  };
  for (const Param& p : model.store.params())
    for (int64_t i = 0; i < p.value.numel(); ++i) CHECK(p.value.to_vector<float>()[i] == (is_mine(p.value.offset() + i) ? 9.0f : 1.0f));
  std::vector<Tensor> parts;
  for (const ArenaRange& part : own) parts.push_back(Tensor::zeros({part.count()}, DType::f32));
  std::vector<std::string> seen;
  sync.gather(parts, [&](const Param& p, const Tensor& values) {
    seen.push_back(p.name);
    CHECK(values.shape() == p.value.shape());
    for (int64_t i = 0; i < values.numel(); ++i) CHECK(values.to_vector<float>()[i] == (is_mine(p.value.offset() + i) ? 2.0f : 1.0f));
  });
  CHECK(seen == std::vector<std::string>{"p2", "p1", "p0"});

  // A rank that fails with what it got, such as for want of memory, does not leave the others alone in the rest of the collectives.
  recorder.gathered = 0;
  int64_t calls = 0;
  CHECK_THROWS_AS(sync.gather(parts,
                              [&](const Param&, const Tensor&) {
                                ++calls;
                                throw std::bad_alloc();
                              }),
                  std::bad_alloc);
  CHECK(calls == 1);
  CHECK(recorder.gathered == sync.buckets());
}

TEST_CASE("gradients: in bf16 they leave as a copy and come back rounded", "[dist]") {
  for (const bool sharded : {false, true}) {
    Model model({40, 7, 90}, {}, sharded ? 2 : 1);
    Recorder recorder(0, 2);
    GradientSync sync(recorder, model.store.params(), {100, DType::bf16, sharded});
    for (Param& p : model.store.params()) kernels::fill(p.grad, 1.001);
    sync.begin();
    sync.finish();
    for (const Tensor& sent : recorder.begun) CHECK(sent.dtype() == DType::bf16);
    const std::vector<ArenaRange> own = sync.own();
    for (const Param& p : model.store.params())
      for (int64_t i = 0; i < p.grad.numel(); ++i) {
        const int64_t at = p.grad.offset() + i;
        const bool mine = std::any_of(own.begin(), own.end(), [&](const ArenaRange& part) { return at >= part.begin && at < part.end; });
        CHECK(p.grad.to_vector<float>()[i] == (!sharded || mine ? 2.0f : 1.001f));
      }
  }
}
