#include "emulator.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "device_memory.h"
#include "fibers.h"
#include "mesa/base/error.h"
#include "mesa/base/random.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace mesa::emulation {

unsigned detail::present = 0;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  int group;
};

struct Thread {
  uint3 index{};
  int number = 0;
  bool left = true;
  Fiber* fiber = nullptr;
  const uint64_t* waits_on = nullptr;  // it may run once this differs from `seen`
  uint64_t seen = 0;
  const char* waits_in = "";
  std::vector<Copy> copies;
  int committed = 0;
};

namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxShared = 227 << 10;
constexpr size_t kCanary = 64;
constexpr unsigned char kFresh = 0xff;  // NaN to whoever reads before writing

/// Lanes of one mask that exchange values; two sets of places, so that a fast lane does not overwrite what a slow one still reads.
struct Meeting {
  unsigned mask = 0, arrived = 0, took_part = 0;
  uint64_t generation = 0;
  const char* operation = "";
  void (*combine)(unsigned char*) = nullptr;
  alignas(16) unsigned char places[2][32 * kDeposit];
};

struct Warp {
  unsigned alive = 0;  // lanes that have not left the kernel
  std::vector<std::unique_ptr<Meeting>> meetings;
};

struct Block {
  std::function<void()> const* thread = nullptr;
  int threads = 0, begun = 0, finished = 0;
  int turn = 0;  // whose turn it is, in `order`
  int at_barrier = 0, barrier_line = 0;
  uint64_t barrier_generation = 0;
  std::string error;
};

std::vector<int> order;  // of the threads of a block
std::vector<Thread> threads(kMaxThreads);
std::vector<Warp> warps(kMaxThreads / 32);
Block block;
std::unique_ptr<unsigned char[]> shared;
int64_t launch_count = 0;
std::map<std::string, int64_t> launches_by_name;

// --- a thread's life --------------------------------------------------------------------------------------------------------------

void thread_after_thread();

/// Another thread that can run, in a circle after this one; `outside` if there is none.
Fiber& next_fiber() {
  if (block.begun < block.threads) return idle_fiber(&thread_after_thread);
  for (int i = 0; i < block.threads; ++i) {
    if (++block.turn >= block.threads) block.turn = 0;
    const Thread& thread = threads[order[block.turn]];
    if (!thread.left && *thread.waits_on != thread.seen) return *thread.fiber;
  }
  return outside;
}

inline void wait(const uint64_t& generation, uint64_t seen, const char* where) {
  Thread& self = *current->thread;
  self.waits_on = &generation;
  self.seen = seen;
  self.waits_in = where;
  self.fiber = current;
  switch_to(next_fiber());
  threadIdx = self.index;
}

inline void deposit(unsigned char* to, const void* value, size_t bytes) {
  if (bytes == 4)
    std::memcpy(to, value, 4);  // the usual sizes without a call
  else if (bytes == 8)
    std::memcpy(to, value, 8);
  else
    std::memcpy(to, value, bytes);
}

/// The deposits are complete once every lane of the mask has come that is still there.
bool complete(Meeting& meeting, unsigned alive) {
  if (meeting.arrived == 0 || (meeting.arrived & alive) != (meeting.mask & alive)) return false;
  if (meeting.combine != nullptr) meeting.combine(meeting.places[meeting.generation % 2]);
  meeting.took_part = meeting.arrived;
  meeting.arrived = 0;
  ++meeting.generation;
  return true;
}

void check_barrier() {
  if (block.at_barrier == 0 || block.at_barrier + block.finished < block.threads) return;
  if (block.finished > 0)
    give_up(concat(block.at_barrier, " of ", block.threads, " threads wait in __syncthreads of line ", block.barrier_line,
                   " and the others have left the kernel"));
  block.at_barrier = 0;
  ++block.barrier_generation;
}

std::string name_of(const Thread& thread) { return concat("thread (", thread.index.x, ", ", thread.index.y, ", ", thread.index.z, ")"); }

Thread* next_thread() {
  if (block.begun == block.threads) return nullptr;
  block.turn = block.begun;
  Thread& thread = threads[order[block.begun++]];
  thread.left = false;
  threadIdx = thread.index;
  return &thread;
}

struct GivenUp {};  // thrown by give_up: ends a thread, but cannot leave its stack

void leave(Thread& thread) {
  thread.left = true;
  thread.copies.clear();
  thread.committed = 0;
  ++block.finished;
  Warp& warp = warps[thread.number / 32];
  warp.alive &= ~(1u << thread.number % 32);
  for (const auto& meeting : warp.meetings) complete(*meeting, warp.alive);
  check_barrier();
}

/// False if the kernel must end here.
bool run_thread(Thread& thread) {
  try {
    (*block.thread)();
    leave(thread);
    return true;
  } catch (const GivenUp&) {
  } catch (const std::exception& error) {
    block.error = concat(name_of(thread), ": threw: ", error.what());
  }
  return false;
}

/// What a fiber does: thread after thread, until one waits in it. Then another fiber takes over.
void thread_after_thread() {
  for (;;) {
    while ((current->thread = next_thread()) != nullptr)
      if (!run_thread(*current->thread))
        for (;;) switch_to(outside);
    rest();
    switch_to(next_fiber());
  }
}

/// After an error threads stay where they are; their stacks and meetings begin anew.
void abandon_threads() {
  forget_fibers();
  for (Warp& warp : warps) warp.meetings.clear();
  for (Thread& thread : threads) {
    thread.copies.clear();
    thread.committed = 0;
  }
}

// --- blocks -----------------------------------------------------------------------------------------------------------------------

std::string place() { return concat("block (", blockIdx.x, ", ", blockIdx.y, ", ", blockIdx.z, ")"); }

std::string deadlock() {
  std::map<std::string, int> waiting;
  for (int t = 0; t < block.threads; ++t)
    if (!threads[t].left) ++waiting[threads[t].waits_in];
  std::string text = "deadlock:";
  for (const auto& [where, count] : waiting)
    text += concat(text.back() == ':' ? " " : ", ", count, " of ", block.threads, " threads wait in ", where);
  return text + concat(", ", block.finished, " have left");
}

void begin_block(size_t shared_bytes) {
  block.begun = block.finished = block.at_barrier = 0;
  std::memset(shared.get(), kFresh, shared_bytes);
  for (int t = 0; t < block.threads; t += 32) {
    const int lanes = std::min(32, block.threads - t);
    warps[t / 32].alive = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
  }
}

void run_block(size_t shared_bytes) {
  begin_block(shared_bytes);
  switch_to(idle_fiber(&thread_after_thread));  // back when all threads have left, none can go on, or one gave up
  if (block.finished < block.threads && block.error.empty()) block.error = deadlock();
#ifndef MESA_EMULATION_ASAN  // which sees more, sooner
  for (size_t i = 0; i < kCanary; ++i)
    if (shared[shared_bytes + i] != kFresh) block.error = concat("wrote beyond its ", shared_bytes, " bytes of dynamic shared memory");
#endif
}

Order& chosen_order() {
  static Order chosen = [] {
    const char* wish = std::getenv("MESA_EMULATION_ORDER");
    const std::string name = wish ? wish : "";
    check(name.empty() || name == "forward" || name == "reverse" || name == "shuffled", "MESA_EMULATION_ORDER is '", name,
          "'; it may be forward, reverse or shuffled");
    return name == "reverse" ? Order::reverse : name == "shuffled" ? Order::shuffled : Order::forward;
  }();
  return chosen;
}

void arrange_threads(dim3 shape) {
  order.resize(block.threads);
  std::iota(order.begin(), order.end(), 0);
  if (chosen_order() == Order::reverse) std::reverse(order.begin(), order.end());
  if (chosen_order() == Order::shuffled)
    for (int i = block.threads - 1; i > 0; --i)
      std::swap(order[i], order[mix64(static_cast<uint64_t>(launch_count) * kMaxThreads + i) % (i + 1)]);
  for (int t = 0; t < block.threads; ++t) {
    const unsigned u = static_cast<unsigned>(t);
    threads[t].number = t;
    threads[t].index = {u % shape.x, u / shape.x % shape.y, u / shape.x / shape.y};
  }
}

uint64_t arranged_block(uint64_t i, uint64_t blocks) {
  switch (chosen_order()) {
    case Order::forward: return i;
    case Order::reverse: return blocks - 1 - i;
    case Order::shuffled: return (i * 2654435761u + mix64(static_cast<uint64_t>(launch_count))) % blocks;  // a prime: every block once
  }
  return i;
}

void check_shape(const char* kernel, dim3 grid, dim3 shape, size_t shared_bytes) {
  const uint64_t count = uint64_t{shape.x} * shape.y * shape.z;
  check(count > 0 && count <= kMaxThreads && shape.z <= 64, kernel, ": blocks of ", shape.x, " x ", shape.y, " x ", shape.z, " threads");
  check(grid.x > 0 && grid.x < 0x80000000u && grid.y > 0 && grid.z > 0 && grid.y < 65536 && grid.z < 65536, kernel, ": a grid of ", grid.x,
        " x ", grid.y, " x ", grid.z, " blocks");
  check(shared_bytes <= kMaxShared, kernel, ": ", shared_bytes, " bytes of shared memory for a block");
}

std::recursive_mutex one_kernel;

}  // namespace

void run(const char* kernel, dim3 grid, dim3 shape, size_t shared_bytes, const std::function<void()>& thread) {
  check_shape(kernel, grid, shape, shared_bytes);
  const std::lock_guard lock(one_kernel);
  check(current == nullptr, kernel, ": a kernel cannot start another");
  if (finish_current_stream) finish_current_stream();
  const DeviceAccess access;
  ++launch_count;
  ++launches_by_name[kernel];
  block.thread = &thread;
  block.threads = static_cast<int>(shape.x * shape.y * shape.z);
  blockDim = shape;
  gridDim = grid;
  arrange_threads(shape);
#ifdef MESA_EMULATION_ASAN
  shared.reset(new unsigned char[shared_bytes]);
#else
  shared.reset(new unsigned char[shared_bytes + kCanary]);
  std::memset(shared.get() + shared_bytes, kFresh, kCanary);
#endif
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  current = &outside;
  for (uint64_t i = 0; i < blocks && block.error.empty(); ++i) {
    const uint64_t b = arranged_block(i, blocks);
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y), static_cast<unsigned>(b / grid.x / grid.y)};
    run_block(shared_bytes);
  }
  current = nullptr;
  if (block.error.empty()) return;
  abandon_threads();
  const std::string error = std::move(block.error);
  block.error.clear();
  fail("", kernel, ", ", place(), ": ", error);
}

const std::map<std::string, int64_t>& launches() { return launches_by_name; }
void set_order(Order wish) { chosen_order() = wish; }

// --- what a thread sees -----------------------------------------------------------------------------------------------------------

unsigned char* shared_memory() { return shared.get(); }

void give_up(const std::string& what) {
  block.error = concat(name_of(*current->thread), ": ", what);
  throw GivenUp();
}

void barrier(int line) {
  if (block.at_barrier > 0 && line != block.barrier_line)
    give_up(
        concat("waits in __syncthreads of line ", line, " while ", block.at_barrier, " threads wait in that of line ", block.barrier_line));
  block.barrier_line = line;
  const uint64_t seen = block.barrier_generation;
  ++block.at_barrier;
  check_barrier();
  if (block.barrier_generation == seen) wait(block.barrier_generation, seen, "__syncthreads");
}

const unsigned char* exchange(unsigned mask, const void* value, size_t bytes, const char* operation, void (*combine)(unsigned char*)) {
  Thread& self = *current->thread;
  Warp& warp = warps[self.number / 32];
  const unsigned bit = 1u << self.number % 32;
  if (bytes > kDeposit) give_up("an exchange of too many bytes");
  if (!(mask & bit)) give_up(concat("takes part in ", operation, " whose mask leaves it out"));
  auto found = std::find_if(warp.meetings.begin(), warp.meetings.end(), [&](const auto& m) { return m->mask == mask; });
  if (found == warp.meetings.end()) {
    warp.meetings.push_back(std::make_unique<Meeting>());
    found = warp.meetings.end() - 1;
    (*found)->mask = mask;
  }
  Meeting& meeting = **found;
  if (meeting.arrived != 0 && meeting.operation != operation && std::strcmp(meeting.operation, operation) != 0)
    give_up(concat("is in ", operation, " while other lanes wait for it in ", meeting.operation));
  if (meeting.arrived != 0 && meeting.combine != combine)
    give_up(concat("is in another form of ", operation, " than lanes that wait for it"));
  meeting.operation = operation;
  meeting.combine = combine;
  unsigned char* const places = meeting.places[meeting.generation % 2];
  deposit(places + kDeposit * (self.number % 32), value, bytes);
  meeting.arrived |= bit;
  const uint64_t seen = meeting.generation;
  if (!complete(meeting, warp.alive)) wait(meeting.generation, seen, operation);
  detail::present = meeting.took_part;
  return places;
}

const unsigned char* exchange_warp(const void* value, size_t bytes, const char* operation, void (*combine)(unsigned char*)) {
  const unsigned char* const all = exchange(0xffffffffu, value, bytes, operation, combine);
  if (present() != 0xffffffffu) give_up(concat(operation, " needs all 32 lanes of the warp"));
  return all;
}

void copy_later(void* to, const void* from, size_t bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes != 0) give_up("cp.async of unaligned addresses");
  current->thread->copies.push_back({to, from, bytes, current->thread->committed});
}

void commit_copies() { ++current->thread->committed; }

void wait_for_copies(int pending) {
  Thread& self = *current->thread;
  const auto waits = [&](const Copy& copy) { return copy.group + pending >= self.committed; };
  const auto end = std::find_if(self.copies.begin(), self.copies.end(), waits);
  for (auto copy = self.copies.begin(); copy != end; ++copy) std::memcpy(copy->to, copy->from, copy->bytes);
  self.copies.erase(self.copies.begin(), end);
}

}  // namespace mesa::emulation
