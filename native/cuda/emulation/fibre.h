// A thread of a block: a stack that can be left and entered again. All fibres of a block run on one thread of the host.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace viaduct::emulation {

constexpr size_t kStackBytes = size_t{128} << 10;

class Fibre {
 public:
  Fibre() = default;
  /// The next enter() begins `entry` on this stack. `entry` must not return.
  void prepare(char* stack, void (*entry)());
  /// Leaves the caller's stack, which `from` keeps, and goes on in this one.
  void enter(Fibre& from);

 private:
#if defined(__x86_64__)
  void* top_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace viaduct::emulation
