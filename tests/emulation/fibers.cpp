#include "fibers.h"

#include <sys/mman.h>

#include <exception>
#include <memory>
#include <vector>

#ifdef MESA_EMULATION_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace mesa::emulation {

Fiber* current = nullptr;
Fiber outside;

namespace {

constexpr size_t kStack = 256 << 10, kPage = 4096;

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Fiber*> idle;
void (*main_of_fibers)() = nullptr;

void begin(boost::context::detail::transfer_t from) {
  arrive(from);
  main_of_fibers();
}

void make_ready(Fiber& fiber) {
  fiber.thread = nullptr;
  fiber.fake_stack = nullptr;
  fiber.resume = boost::context::detail::make_fcontext(fiber.memory + kPage + fiber.size, fiber.size, begin);
  idle.push_back(&fiber);
}

void add_fiber() {
  auto fiber = std::make_unique<Fiber>();
  void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  // The lowest page is closed, to catch an overflow.
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) std::terminate();
  fiber->memory = static_cast<unsigned char*>(memory);
  fiber->bottom = fiber->memory + kPage;
  fiber->size = kStack - kPage - fibers.size() * 320 % 32768;  // tops that do not all fall into the same lines of the cache
  make_ready(*fiber);
  fibers.push_back(std::move(fiber));
}

}  // namespace

Fiber& idle_fiber(void (*main)()) {
  main_of_fibers = main;
  if (idle.empty()) add_fiber();
  Fiber& fiber = *idle.back();
  idle.pop_back();
  return fiber;
}

void rest() { idle.push_back(current); }

void forget_fibers() {
  idle.clear();
  for (const auto& fiber : fibers) {
#ifdef MESA_EMULATION_ASAN
    __asan_unpoison_memory_region(fiber->bottom, fiber->size);
#endif
    make_ready(*fiber);
  }
}

}  // namespace mesa::emulation
