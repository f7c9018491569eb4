// Leaving one stack and entering another; see fibre.h. Where there is no form for the processor, ucontext serves.
#include "fibre.h"

#include <cstdint>

namespace viaduct::emulation {

#if defined(__x86_64__)

// Keeps what a call must keep on the old stack, takes it from the new one, and returns there.
asm(R"(
.text
.type viaductSwitchStacks, @function
viaductSwitchStacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size viaductSwitchStacks, .-viaductSwitchStacks
)");
extern "C" void viaductSwitchStacks(void** from, void* to) __attribute__((visibility("hidden")));

void Fibre::prepare(char* stack, void (*entry)()) {
  auto** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + kStackBytes) & ~uintptr_t{15});
  *--top = nullptr;  // where `entry` would return to; it also aligns the stack as a call does
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  top_ = top;
}

void Fibre::enter(Fibre& from) { viaductSwitchStacks(&from.top_, top_); }

#else

void Fibre::prepare(char* stack, void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fibre::enter(Fibre& from) { swapcontext(&from.context_, &context_); }

#endif

}  // namespace viaduct::emulation
