// The CUDA runtime as the plug-in uses it. Under emulation the same names come from emulation/include: nothing else differs.
#pragma once

#include <cuda_runtime.h>

#include "../errors.h"

namespace viaduct::cuda {

/// Throws when a call failed: ERR_OUT_OF_MEMORY, else ERR_NATIVE with CUDA's words. `what` names the call.
void check(cudaError_t status, const char* what);

/// "an illegal memory access was encountered (cudaErrorIllegalAddress)".
std::string errorText(cudaError_t status);

}  // namespace viaduct::cuda
