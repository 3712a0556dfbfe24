// Stacks that take turns on one thread of the system, known to AddressSanitizer.
#pragma once
#include <boost/context/detail/fcontext.hpp>
#include <cstddef>

#include "device_memory.h"

#ifdef MESA_EMULATION_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

namespace mesa::emulation {

struct Thread;

struct Fiber {
  Thread* thread = nullptr;  // what runs here, if anything
  unsigned char* memory = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
  boost::context::detail::fcontext_t resume = nullptr;
  void* fake_stack = nullptr;  // where the sanitizer keeps the frames of functions that returned
};

extern Fiber* current;
/// The stack that everything started on.
extern Fiber outside;

/// A fiber that stands at the start of `main`, or where it called rest(). `main` does not return.
Fiber& idle_fiber(void (*main)());
/// Makes the current fiber idle; somebody has to switch.
void rest();
/// Forgets what every fiber was doing: all are idle, at their start. From `outside` only.
void forget_fibers();

inline void arrive(boost::context::detail::transfer_t from) {
  Fiber& before = *static_cast<Fiber*>(from.data);
  before.resume = from.fctx;
#ifdef MESA_EMULATION_ASAN
  __sanitizer_finish_switch_fiber(current->fake_stack, &before.bottom, &before.size);
#endif
}

/// Goes on there; returns when somebody switches back. Inline, since a return after a switch costs a wrong guess of the processor.
inline void switch_to(Fiber& fiber) {
  Fiber& self = *current;
  current = &fiber;
#ifdef MESA_EMULATION_ASAN
  __sanitizer_start_switch_fiber(&self.fake_stack, fiber.bottom, fiber.size);
#endif
  arrive(boost::context::detail::jump_fcontext(fiber.resume, &self));
}

}  // namespace mesa::emulation
