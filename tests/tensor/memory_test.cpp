// The allocator: what the meter says, what is reused, names that are never reused.
#include "mesa/tensor/memory.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdlib>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <thread>

#include "mesa/kernels/loss.h"
#include "mesa/tensor/tensor.h"
#include "support/device.h"
#include "support/random.h"

using namespace mesa;
using namespace mesa::testing;
using Catch::Matchers::Contains;

TEST_CASE("memory: the meter counts what is asked for, by kind, and the peak with its parts") {
  for (Device device : {kCpu, kMeta}) {
    Allocator& memory = Allocator::of(device);
    memory.reset_peak();
    const MemoryUse before = memory.use();
    {
      const Tensor a = Tensor::empty({1000}, DType::f32, device, MemoryKind::activations);
      const Tensor w = Tensor::empty({10}, DType::f64, device, MemoryKind::workspace);
      CHECK(memory.use().of(MemoryKind::activations) - before.of(MemoryKind::activations) == 4000);
      CHECK(memory.use().of(MemoryKind::workspace) - before.of(MemoryKind::workspace) == 80);
      CHECK(memory.use().total - before.total == 4080);
      w.buffer()->retag(MemoryKind::activations);
      CHECK(memory.use().of(MemoryKind::activations) - before.of(MemoryKind::activations) == 4080);
      CHECK(memory.use().total - before.total == 4080);
    }
    CHECK(memory.use().total == before.total);
    CHECK(memory.use().peak - before.total == 4080);
    CHECK(memory.use().peak_kind[static_cast<int>(MemoryKind::activations)] >= 4000);
    memory.reset_peak();
    CHECK(memory.use().peak == before.total);
  }
}

TEST_CASE("memory: a released block serves again without asking the system, under a new name") {
  Allocator& memory = Allocator::of(kCpu);
  auto first = memory.allocate(123456, MemoryKind::workspace);
  const void* const address = first->data();
  const uint64_t id = first->id();
  first.reset();
  const MemoryUse before = memory.use();
  const auto second = memory.allocate(123400, MemoryKind::workspace);  // the same size class
  CHECK(second->data() == address);
  CHECK(second->id() != id);
  CHECK(memory.use().system_allocations == before.system_allocations);
  CHECK(memory.use().reserved == before.reserved);
}

TEST_CASE("memory: a cache of its own shares no block, and gives all back in the end") {
  Allocator& memory = Allocator::of(kCpu);
  memory.release_cached();
  const int64_t before = memory.use().reserved;
  const auto bytes = int64_t{777} * 1000;
  void* address = nullptr;
  std::shared_ptr<Buffer> survivor;
  {
    auto cache = memory.new_cache();
    {
      const Allocator::Using own(memory, cache);
      address = memory.allocate(bytes, MemoryKind::workspace)->data();  // released at once, into its cache
      CHECK(memory.allocate(bytes, MemoryKind::workspace)->data() == address);
      survivor = memory.allocate(1000, MemoryKind::workspace);
      const auto lasting = memory.allocate(bytes, MemoryKind::optimizer);
      CHECK(lasting->data() != address);  // what outlives a pass belongs to no pass
    }
    CHECK(memory.allocate(bytes, MemoryKind::workspace)->data() != address);
    memory.release_cached();  // everybody's
    CHECK(memory.use().reserved - before >= bytes + 1000);
    const Allocator::Using again(memory, cache);
    CHECK(memory.allocate(bytes, MemoryKind::workspace)->data() == address);
  }
  CHECK(memory.use().reserved - before >= bytes);  // a tensor of it still lives
  survivor.reset();
  CHECK(memory.use().reserved == before);
}

TEST_CASE("memory: blocks are aligned and little is wasted") {
  Allocator& memory = Allocator::of(kCpu);
  for (int64_t bytes : {1, 63, 64, 65, 1000, 4097, 100001, 3000001, 5000000}) {
    INFO(bytes);
    memory.release_cached();  // so that the block comes from the system
    const int64_t before = memory.use().reserved;
    const auto block = memory.allocate(bytes, MemoryKind::workspace);
    CHECK(reinterpret_cast<uintptr_t>(block->data()) % 64 == 0);
    CHECK(block->bytes() == bytes);
    CHECK(memory.use().reserved - before >= bytes);
    if (bytes > 512) CHECK(memory.use().reserved - before <= bytes + std::max<int64_t>(bytes / 8 + 64, 2 << 20));
  }
  memory.release_cached();
}

#ifndef __SANITIZE_ADDRESS__  // which is to see every block, so that none shares a segment

namespace {

/// Allocates and releases as a run might: what lasts, and blocks of many sizes whose lives overlap. `look` sees all that live.
void use_memory(Allocator& memory, uint64_t seed, const std::function<void(const std::vector<std::shared_ptr<Buffer>>&)>& look = nullptr) {
  std::mt19937_64 random(seed);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
  std::vector<std::shared_ptr<Buffer>> live;
  for (int i = 0; i < 3000; ++i) {
    if (live.size() < 40 && below(5) < 3)
      live.push_back(
          memory.allocate(below(3) == 0 ? below(2'000) : below(600'000), below(8) == 0 ? MemoryKind::optimizer : MemoryKind::workspace));
    else if (!live.empty())
      live.erase(live.begin() + below(static_cast<int64_t>(live.size())));
    if (look) look(live);
  }
}

void check_apart(const std::vector<std::shared_ptr<Buffer>>& live) {
  std::map<const char*, int64_t> blocks;
  for (const auto& buffer : live) {
    REQUIRE(reinterpret_cast<uintptr_t>(buffer->data()) % 64 == 0);
    REQUIRE(blocks.emplace(static_cast<const char*>(buffer->data()), buffer->bytes()).second);
  }
  const char* end = nullptr;
  for (const auto& [address, bytes] : blocks) {
    REQUIRE(address >= end);
    end = address + bytes;
  }
}

}  // namespace

TEST_CASE("memory: on a GPU blocks of all sizes share what is free") {
  std::vector<Device> gpus{kMetaCuda};
  if (test_device() == kCuda) gpus.push_back(kCuda);
  for (const Device device : gpus) {
    INFO(to_string(device.kind));
    Allocator& memory = Allocator::of(device);
    memory.release_cached();
    const int64_t before = memory.use().reserved;
    memory.reserve(0, 8 << 20);
    std::vector<std::shared_ptr<Buffer>> parts;
    for (const int64_t bytes : {3'000'000, 5'000'000, 100, 300'000}) parts.push_back(memory.allocate(bytes, MemoryKind::workspace));
    parts.erase(parts.begin(), parts.begin() + 2);
    const int64_t taken = memory.use().reserved;
    const auto both = memory.allocate(7'999'999, MemoryKind::workspace);
    CHECK(memory.use().reserved == taken);
    CHECK(taken - before <= 8 << 20);
    // The rest stays for as long as something in it lives.
    parts.clear();
    memory.release_cached();
    CHECK(memory.use().reserved == (device == kCuda ? taken : before + 8'000'512));  // to the end of what the first two left
  }
}

TEST_CASE("memory: on a GPU blocks are cut from the end of a free stretch that is asked for") {
  Allocator& memory = Allocator::of(kMetaCuda);
  for (const BlockEnd end : {BlockEnd::low, BlockEnd::high}) {
    memory.cut_from(end);
    const auto cache = memory.new_cache();
    const Allocator::Using own(memory, cache);
    const int64_t before = memory.use().reserved;
    const auto block = [&](int64_t bytes) { return memory.allocate(bytes, MemoryKind::workspace); };
    auto first = block(1 << 20), second = block(1 << 20);
    first.reset();
    const auto small = block(1 << 10);
    second.reset();
    const auto large = block(3 << 19);  // behind the small one, which lies at the start of the first one's place or at its end
    CHECK(memory.use().reserved - before == (end == BlockEnd::low ? 2 << 20 : 5 << 19));
  }
  memory.cut_from(BlockEnd::high);
}

TEST_CASE("memory: plans of random sizes and lives are mostly little larger than what is alive") {
  Allocator& meta = Allocator::of(kMetaCuda);
  std::vector<double> shares;
  for (uint64_t i = 0; i < 9; ++i) {
    meta.release_cached();
    const int64_t before = meta.use().reserved;
    int64_t live = 0;
    use_memory(meta, test_seed() + i, [&](const auto&) { live = std::max(live, meta.use().total); });
    shares.push_back(static_cast<double>(meta.use().reserved - before) / static_cast<double>(live));
  }
  meta.release_cached();
  INFO("MESA_TEST_SEED=" << test_seed());
  std::sort(shares.begin(), shares.end());
  CHECK(shares[4] < 1.5);  // one alone may be unlucky
}

TEST_CASE("memory: what a plan says is enough, and nothing overlaps") {
  if (test_device() != kCuda) return;
  const uint64_t seed = test_seed();
  INFO("MESA_TEST_SEED=" << seed);
  Allocator &meta = Allocator::of(kMetaCuda), &memory = Allocator::of(kCuda);
  meta.release_cached(), memory.release_cached();
  const MemoryUse planned_before = meta.use();
  use_memory(meta, seed, [](const auto&) {});
  const int64_t planned = meta.use().reserved - planned_before.reserved, lasting = meta.use().lasting - planned_before.lasting;
  const MemoryUse before = memory.use();
  memory.reserve(lasting, planned - lasting);
  CHECK(memory.use().covered == 0);
  use_memory(memory, seed, check_apart);
  CHECK(memory.use().system_allocations - before.system_allocations == 2);
  CHECK(memory.use().covered == planned - lasting);
  memory.release_cached();
  CHECK(memory.use().reserved == before.reserved);
  use_memory(memory, seed, check_apart);  // without a plan
  CHECK(memory.use().reserved > before.reserved);
  memory.release_cached();
  CHECK(memory.use().reserved == before.reserved);
}

#endif

TEST_CASE("memory: on request each block of a GPU is the driver's own, and no longer than was asked for") {
  if (test_device() != kCuda) return;
  Allocator& memory = Allocator::of(kCuda);
  const char* const set = std::getenv("MESA_OWN_BLOCKS");
  setenv("MESA_OWN_BLOCKS", "1", 1);
  const auto cache = memory.new_cache();
  if (set == nullptr) unsetenv("MESA_OWN_BLOCKS");
  const Allocator::Using own(memory, cache);
  const MemoryUse before = memory.use();
  for (const int64_t bytes : {100, 100, 1'000'001}) {
    const auto block = memory.allocate(bytes, MemoryKind::workspace), other = memory.allocate(1, MemoryKind::activations);
    CHECK(memory.use().reserved == before.reserved + bytes + 1);
  }
  CHECK(memory.use().reserved == before.reserved);
  CHECK(memory.use().system_allocations == before.system_allocations + 6);
}

// A checking tool must see this; one that does not checks nothing.
TEST_CASE("memory: a kernel that reads beyond a tensor", "[.planted]") {
  const Tensor logits = to(Tensor::zeros({2, 10}, DType::f32), test_device());
  const Tensor labels = to(Tensor::from<int64_t>({2}, {0, 10}), test_device()), loss = Tensor::empty({2}, DType::f32, test_device());
  kernels::cross_entropy(logits, labels, 0, loss);
  loss.to_vector<double>();
}

TEST_CASE("memory: more than there is fails with the request and what is in use") {
  const Tensor held = Tensor::empty({5000}, DType::f32, kCpu, MemoryKind::optimizer);
  try {
    Allocator::of(kCpu).allocate(int64_t{1} << 60, MemoryKind::activations);
    FAIL("an exabyte was handed out");
  } catch (const Error& error) {
    CHECK_THAT(error.what(), Contains("out of memory") && Contains("were asked for activations") && Contains("optimizer"));
  }
  const auto empty = Allocator::of(kCpu).allocate(0, MemoryKind::workspace);
  CHECK(empty->bytes() == 0);
}

TEST_CASE("memory: threads may allocate and release at once") {
  Allocator& memory = Allocator::of(kCpu);
  const int64_t before = memory.use().total;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&memory, t] {
      for (int i = 0; i < 2000; ++i) {
        const auto a = memory.allocate(64 * (1 + (i * 7 + t) % 50), MemoryKind::workspace);
        *static_cast<char*>(a->data()) = 1;
      }
    });
  for (std::thread& t : threads) t.join();
  CHECK(memory.use().total == before);
}

TEST_CASE("memory: sizes read well") {
  CHECK(format_bytes(0) == "0 B");
  CHECK(format_bytes(999) == "999 B");
  CHECK(format_bytes(12300) == "12.3 kB");
  CHECK(format_bytes(12300000) == "12.3 MB");
  CHECK(format_bytes(2500000000) == "2.50 GB");
}
