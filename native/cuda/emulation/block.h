// Running kernels: blocks one after the other in random order, their threads as fibres that change at barriers, in random
// order. cuda_runtime.h and intrinsics.h have what kernels call; this is what the other files of the emulation need.
#pragma once

#include <cstddef>
#include <string>

#include "shadow.h"

namespace viaduct::emulation {

/// The one shadow of the process, behind one mutex with everything else here.
Shadow& shadow();
void lockEmulation();
void unlockEmulation();

/// An access of the thread that runs. Ends the kernel when it is an error; `place` is where in the code.
void noteAccess(void* at, size_t bytes, bool write, void* place);
/// Ends the kernel with this error of the thread that runs.
void failAt(const std::string& what);

}  // namespace viaduct::emulation
